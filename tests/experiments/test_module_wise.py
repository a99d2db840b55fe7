"""The module-wise experiment on a few digits."""

from dataclasses import replace

import torch
from module_settings import SETTINGS
from module_wise import EXPERIMENT, RIVALS, Config, build, candidates, choose, lengths, main, objective, parts_of

from lab.experiment import run
from lab.statistics import Interval
from lab.thesis import thesis
from odenets.least_action import ActionPenalty
from odenets.training.runs import read_summary

TINY = Config(workers=1, quick=True)


def test_a_run_leaves_its_table_and_figures(tmp_path):
    config = replace(TINY, schedules=("parallel",), rivals=RIVALS, validation_size=50, test_size=50)
    run(EXPERIMENT, replace(config, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert [(row["schedule"], row["method"]) for row in rows] == [*config.ways]
    assert len(rows[0]["modules"]) == 10
    assert (tmp_path / "run" / "figures" / "modules_60_parallel.png").exists()


def test_the_settings_are_listed(capsys):
    main(Config(list=True))
    shown = capsys.readouterr().out
    assert all(name in shown for name in SETTINGS)


def test_settings_are_chosen_on_validation_alone():
    config = replace(TINY, schedules=("parallel",))
    jobs = candidates(replace(config, quick=False))
    tuned = [
        {**vars(job), "validation": [0.5, 0.9 if (job.learning_rate, job.tau) in ((0.05, 0.5), (0.01, 0.0)) else 0.1]}
        for job in jobs
    ]
    chosen = choose(replace(config, quick=False), tuned)
    assert {(job.method, job.learning_rate, job.tau) for job in chosen} == {
        ("VanGL", 0.01, 0.0),
        ("TRGL", 0.05, 0.5),
        ("end-to-end", 0.01, 0.0),
    }
    assert not {job.seed for job in chosen} & {job.seed for job in jobs}


def test_epochs_of_the_thesis():
    setting = SETTINGS["cifar10-10-1"]
    assert lengths(setting, "sequential") == [50 + 10 * k for k in range(10)]
    assert lengths(setting, "laps") == [10 + 2 * k for k in range(10)]
    assert lengths(setting, "parallel") == [300]


def test_settings_name_a_table_of_the_thesis_that_has_their_figures():
    for setting in SETTINGS.values():
        figures = [thesis(setting.thesis, n, f"{way} TRGL") for n in setting.sizes for way in setting.schedules]
        assert any(isinstance(figure, Interval) for figure in figures) == bool(setting.thesis)


def test_seeds_share_weights_at_the_start_and_methods_differ_in_the_objective():
    pool = parts_of(Config())[0]
    setting = Config().table
    one, other = (build(setting, pool, 3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert one.K == 10
    jobs = {job.method: job for job in candidates(Config())}
    found = [objective(setting, jobs["TRGL"])(k, 10) for k in (0, 9)]
    assert all(isinstance(f, ActionPenalty) for f in found)
    assert found[0].weight == 2 * found[1].weight  # type: ignore[union-attr]
    assert not isinstance(objective(setting, jobs["VanGL"])(0, 10), ActionPenalty)


def test_one_classifier_for_all_where_the_thesis_has_one():
    setting = replace(SETTINGS["mnist-20-1"], modules=10, network=SETTINGS["digits"].network)
    modules = build(setting, parts_of(Config())[0], 0)
    assert len({id(module.head) for module in modules.modules_in_order}) == 1


def test_what_decides_a_job_is_written_down():
    setting = EXPERIMENT.settings(TINY, candidates(TINY)[0])
    assert setting["sizes"] == (60,)
    assert setting["same_head"] is False


def test_the_quick_setting_keeps_what_is_given():
    assert TINY.table.sizes == (60,)
    assert (replace(TINY, sizes=(30,)).table.sizes, replace(TINY, epochs=3).table.epochs) == ((30,), (3, 1, 1))
