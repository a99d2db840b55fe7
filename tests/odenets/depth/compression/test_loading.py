import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from odenets import Flow, MLPField, Network, adapt, load_weights, save_weights
from odenets.checkpoints import CHANGES, changes_of
from odenets.depth import compress, heal, load_compressed
from odenets.depth.compression.divergence import run, tensor_in
from odenets.models import small_network
from odenets.weight_files import read_file, write_file
from tests.odenets.depth.compression.test_compression import Functional, images

CHOICES = ("remove", "merge", "fit", "seam")
X = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compression():
    return compress(images(), [X], remove=2)


@pytest.fixture
def small(compression):
    return copy.deepcopy(compression.model)


def check_comes_back(small, build, x, path):
    """That a compressed network comes back from its file to the bit, with the same parts."""
    save_weights(small, path)
    again = load_compressed(build(), path)
    state = again.state_dict()
    assert [*state] == [*small.state_dict()]
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    assert [type(one) for one in again.modules()] == [type(one) for one in small.modules()]
    assert not any(value.is_meta for value in state.values())
    assert torch.equal(tensor_in(run(again.eval(), x)), tensor_in(run(small.eval(), x)))
    assert changes_of(again) == changes_of(small)
    return again


@pytest.mark.parametrize("choice", CHOICES)
def test_a_network_of_plain_modules_comes_back(choice, tmp_path):
    whole = images()
    small = compress(whole, [X], remove=2, choices=[choice]).model
    check_comes_back(small, images, X, tmp_path / "small.safetensors")
    assert changes_of(whole) == []


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("h", [(0.1, 0.4, 0.2, 0.3), (1.0, 1.0, 1.0, 1.0)])
def test_networks_of_flows_come_back_with_their_times(choice, h, tmp_path):
    def build():
        return Network(nn.Flatten(), Flow(MLPField(8, 12), depth=4, h=h, solver="euler"), nn.Linear(8, 3))

    torch.manual_seed(0)
    whole, x = build(), torch.randn(60, 2, 4)
    small = compress(whole, [x], remove=2, choices=[choice]).model
    again = check_comes_back(small, build, x, tmp_path / "small.safetensors")
    flows = [[one for one in net.modules() if isinstance(one, Flow)] for net in (small, again)]
    assert [(one.start, one.h) for one in flows[0]] == [(one.start, one.h) for one in flows[1]]


def test_a_flow_itself_comes_back_whatever_it_becomes(tmp_path):
    def build():
        return Flow(MLPField(6, 8), depth=4, solver="euler")

    torch.manual_seed(0)
    x = torch.randn(60, 6)
    for choice in CHOICES:
        small = compress(build(), [x], remove=2, choices=[choice]).model
        check_comes_back(small, build, x, tmp_path / choice)


@pytest.mark.parametrize("choices", [["remove"], ["seam", "remove"]])
def test_networks_of_several_flows_come_back_with_their_transitions(choices, tmp_path):
    def build():
        flows = [Flow(MLPField(width, 8), depth=3, solver="heun") for width in (6, 4)]
        return Network(nn.Flatten(), flows, nn.Linear(4, 3), transitions=[nn.Linear(6, 4)])

    torch.manual_seed(0)
    x = torch.randn(60, 6)
    small = compress(build(), [x], remove=3, choices=choices).model
    check_comes_back(small, build, x, tmp_path / "small.safetensors")


def test_a_flow_that_has_no_field_yet_gets_those_of_the_whole(tmp_path):
    whole = small_network(solver="bs23", depth=4)
    whole(X)
    small = compress(whole, [X], remove=1).model
    check_comes_back(small, lambda: small_network(solver="bs23", depth=4), X, tmp_path / "small")


def test_a_network_that_was_healed_comes_back(tmp_path):
    whole = images()
    small = compress(whole, [X], remove=3, choices=["merge"], refit=False)
    before = copy.deepcopy(small.model.state_dict())
    healed = heal(small.model, whole, [X], images=240, lr=1e-3)
    assert not torch.equal(healed.state_dict()["1.conv1.weight"], before["1.conv1.weight"])
    check_comes_back(healed, images, X, tmp_path / "healed")


def test_edits_of_depth_afterwards_are_kept(tmp_path):
    whole = small_network(solver="bs23", depth=4)
    small = compress(whole, [X], remove=1, choices=["merge"], refit=False).model
    flow = next(one for one in small.modules() if isinstance(one, Flow))
    flow.resize([*flow.h, 0.25])
    check_comes_back(small, lambda: small_network(solver="bs23", depth=4), X, tmp_path / "deeper")


def test_a_network_that_is_compressed_twice_comes_back(tmp_path):
    once = compress(images(), [X], remove=1, choices=["seam"]).model
    twice = compress(once, [X], remove=2, choices=["remove", "fit"]).model
    assert len(changes_of(twice)) == 2
    again = check_comes_back(twice, images, X, tmp_path / "twice")
    thrice = compress(again, [X], remove=1).model
    check_comes_back(thrice, images, X, tmp_path / "thrice")


def test_branches_that_add_nothing_and_maps_of_replaceme_come_back(tmp_path):
    def branches():
        torch.manual_seed(0)
        return Functional(4)

    x = torch.randn(60, 6)
    check_comes_back(compress(branches(), [x], remove=1).model, branches, x, tmp_path / "branches")
    for remove in (1, 3):
        small = compress(images(), [X], remove=remove, by="replaceme").model
        check_comes_back(small, images, X, tmp_path / "replaceme")


def test_a_compressed_part_of_a_network_comes_back_in_it(small, tmp_path):
    small = nn.Sequential(small, nn.Softmax(-1))
    check_comes_back(small, lambda: nn.Sequential(images(), nn.Softmax(-1)), X, tmp_path / "part")
    more = compress(small, [X], remove=1).model
    check_comes_back(more, lambda: nn.Sequential(images(), nn.Softmax(-1)), X, tmp_path / "more")
    with pytest.raises(ValueError, match="model must have a part '0', which is compressed in"):
        load_compressed(nn.Linear(2, 2), tmp_path / "part")


def test_adapted_networks_come_back_as_the_networks_that_they_are(tmp_path):
    small = compress(adapt(images(), X), [X], remove=2).model
    again = check_comes_back(small, images, X, tmp_path / "small")
    assert torch.equal(load_compressed(adapt(images(), X), tmp_path / "small").eval()(X), again(X))
    save_weights(adapt(small, X), tmp_path / "adapted")
    assert torch.equal(load_compressed(images(), tmp_path / "adapted").eval()(X), again(X))


def test_blocks_that_share_maps_or_have_two_names_come_back(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = images()
            self.body[2].conv1 = self.body[1].conv1
            self.body[4].conv2 = self.body[3].conv2
            self.alias = self.body[3]
            self.list = nn.ModuleList(self.body[1:5])

        def forward(self, x):
            return self.body(x)

    for choice in CHOICES:
        small = compress(Named(), [X], remove=2, choices=[choice]).model
        again = check_comes_back(small, Named, X, tmp_path / choice)
        assert again.alias is again.body[3]
        assert len({*map(id, again.modules())}) == len({*map(id, small.modules())})


def test_networks_in_half_precision_come_back_in_theirs(tmp_path):
    small = compress(images().bfloat16(), [X], remove=3, choices=["seam", "fit"]).model
    again = check_comes_back(small, lambda: images().bfloat16(), X.bfloat16(), tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    wide = load_compressed(images(), tmp_path / "half")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.isfinite(wide.eval()(X)).all()


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=5, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def gemma():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, sliding_window=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.parametrize(
    ("build", "choice"),
    [
        (llama, "seam"),
        (llama, "fit"),
        *(pytest.param(llama, choice, marks=pytest.mark.slow) for choice in ("remove", "merge")),
        *(pytest.param(gpt2, choice, marks=pytest.mark.slow) for choice in CHOICES),
        *(pytest.param(gemma, choice, marks=pytest.mark.slow) for choice in ("remove", "merge", "seam")),
        *(pytest.param(lambda: llama().bfloat16(), choice, marks=pytest.mark.slow) for choice in CHOICES),
    ],
)
def test_models_of_hugging_face_come_back_with_their_configuration(build, choice, tmp_path):
    tokens = torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0))
    small = compress(build(), [{"input_ids": tokens}], remove=2, choices=[choice]).model
    again = check_comes_back(small, build, {"input_ids": tokens}, tmp_path / "small.safetensors")
    assert again.config.to_dict() == small.config.to_dict()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens[:2], **options), small.generate(tokens[:2], **options))


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_the_configuration_that_a_model_was_made_of_stays_as_it_is(tmp_path):
    tokens = {"input_ids": torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0))}
    config, kind = llama().config, type(llama())
    small = compress(kind(config), [tokens], remove=2, choices=["remove"]).model
    path = save_weights(small, tmp_path / "small.safetensors")
    for _ in range(2):
        again = load_compressed(kind(config), path).eval()
        assert (config.num_hidden_layers, again.config.num_hidden_layers) == (5, 3)
        assert {id(part.config) for part in again.modules() if hasattr(part, "config")} == {id(again.config)}
        assert torch.equal(again(**tokens).logits, small.eval()(**tokens).logits)


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_models_in_half_precision_with_wider_buffers_are_fitted_in_single_precision(tmp_path):
    tokens = [{"input_ids": torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0))}]
    llama().save_pretrained(tmp_path)
    half = type(llama()).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    wide = half.model.rotary_emb.inv_freq.clone()
    assert wide.dtype == torch.float32
    small = compress(half, tokens, remove=2, choices=["fit"])
    assert small.gone == 2
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert torch.equal(small.model.model.rotary_emb.inv_freq, wide)
    again = load_compressed(half, save_weights(small.model, tmp_path / "small.safetensors"))
    assert torch.equal(again(**tokens[0]).logits, small.model(**tokens[0]).logits)


def test_what_save_pretrained_does_not_know_is_warned_of(recwarn, tmp_path):
    tokens = [{"input_ids": torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0))}]
    small = compress(llama(), tokens, remove=2, choices=["remove", "fit"])
    assert not len(recwarn)
    with pytest.warns(UserWarning, match=r"without its seams: odenets\.save_weights") as seen:
        seamed = compress(llama(), tokens, remove=2, choices=["seam"])
    assert [warning.filename for warning in seen] == [__file__]
    for one, known in ((small, True), (seamed, False)):
        one.model.save_pretrained(tmp_path)
        again = type(one.model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**tokens[0]).logits, one.model(**tokens[0]).logits) == known


def test_a_mask_that_is_given_as_labels_is_refused():
    tokens, mask = torch.randint(3, 40, (24, 12)), torch.ones(24, 12, dtype=torch.long)
    for call in (
        lambda: compress(llama(), [(tokens, mask)], remove=1),
        lambda: heal(llama(), llama(), [(tokens, mask.bool())]),
    ):
        with pytest.raises(TypeError, match=r"a pair whose second tensor is a mask .* 'attention_mask': mask"):
            call()


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def resnet():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


@pytest.mark.parametrize(
    ("build", "choice"),
    [
        (vit, "seam"),
        *(pytest.param(vit, choice, marks=pytest.mark.slow) for choice in ("remove", "merge", "fit")),
        *(pytest.param(resnet, choice, marks=pytest.mark.slow) for choice in CHOICES),
    ],
)
def test_networks_of_timm_and_torchvision_come_back(build, choice, tmp_path):
    x = torch.rand(24, 3, 16, 16)
    small = compress(build(), [x], remove=1, choices=[choice], kernels=[1]).model
    check_comes_back(small, build, x, tmp_path / "small.safetensors")


def test_weights_and_whole_networks_are_told_apart_with_the_remedy(compression, small, tmp_path):
    file = save_weights(small, tmp_path / "small")
    with pytest.raises(ValueError, match=r"small holds a compressed network: odenets\.depth\.load_compressed\(network"):
        load_weights(images(), file)
    assert load_weights(small, file)
    other = save_weights(images(), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds no compressed network: odenets\.load_weights\(network, path\)"):
        load_compressed(images(), other)
    with pytest.raises(ValueError, match=r"network is compressed and .* holds weights of a whole one"):
        load_weights(small, other)
    with pytest.raises(TypeError, match="network must be a module, got Compression: its model"):
        save_weights(compression, file)
    with pytest.raises(TypeError, match="model must be a torch module, the whole network, got str"):
        load_compressed("resnet18", file)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_compressed(images(), tmp_path / "none")


def test_another_network_than_the_whole_one_is_refused_and_left(small, tmp_path):
    file = save_weights(small, tmp_path / "small")
    with pytest.raises(ValueError, match=r"model must be built as the network that was .* no '6\.conv1\.weight'"):
        load_compressed(images(depth=6), file)
    wide = nn.Sequential(*[*images()])
    wide[8] = nn.Linear(6, 7)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match=r"with '8\.weight' of the shape \(4, 6\), got \(7, 6\); '8\.bias' of the"):
        load_compressed(wide, file)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
    flow = save_weights(compress(small_network(solver="euler", depth=4), [X], remove=1).model, tmp_path / "flow")
    with pytest.raises(ValueError, match="network has flows"):
        load_compressed(images(), flow)
    with pytest.raises(ValueError, match="must have the solver that it was saved with, euler, got heun"):
        load_compressed(small_network(solver="heun", depth=4), flow)
    with pytest.warns(UserWarning, match="the flow '_flows.0' has depth=2|flow '_flows.0' has depth=2") as seen:
        load_compressed(small_network(solver="euler", depth=2), flow)
    assert [warning.filename for warning in seen] == [__file__]


def test_networks_that_are_changed_by_other_means_are_refused(small, tmp_path):
    small[8] = nn.Linear(6, 2)
    file = save_weights(small, tmp_path / "changed")
    with pytest.raises(ValueError, match=r"model must be changed as the compressed .* '8\.bias' of the shape \(2,\)"):
        load_compressed(images(), file)


def test_a_file_with_a_byte_changed_is_refused(small, tmp_path):
    file = save_weights(small, tmp_path / "small")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, its checksum is another"):
        load_compressed(images(), file)


@pytest.mark.parametrize(
    "root",
    [
        {"whole": "", "parts": {"2": {"kind": "os.system", "settings": {}, "parts": {}}}},
        {"whole": "", "parts": {"forward": {"kind": "Identity", "settings": {}, "parts": {}}}},
        {"whole": "", "parts": {"2": {"kind": "Identity", "settings": {"device": "cuda"}, "parts": 3}}},
        {"whole": "", "parts": {"2": {"kind": "Linear", "settings": {"in_features": -1, "out_features": 1}}}},
        {"whole": "", "parts": {"2": {"same": "7"}}},
        {"whole": "gone"},
        {"whole": "", "numbers": {"training": 1}},
        {"whole": "1", "bias": True},
        [],
        "root",
    ],
)
def test_what_a_forged_file_says_is_refused_and_nothing_of_it_runs(root, small, tmp_path):
    tensors, described = read_file(save_weights(small, tmp_path / "small"))
    described["changes"][0]["root"] = root
    file = write_file(tmp_path / "forged", tensors, described)
    with pytest.raises(ValueError, match=r"forged says of a compressed network what this version .* not understand"):
        load_compressed(images(), file)


@pytest.mark.parametrize("changes", [3, [{}], [{"at": ""}], ["changes"]])
def test_changes_that_lack_parts_are_refused(changes, small, tmp_path):
    tensors, described = read_file(save_weights(small, tmp_path / "small"))
    file = write_file(tmp_path / "forged", tensors, described | {"changes": changes})
    with pytest.raises(ValueError, match=r"forged says of a compressed network .* not understand.* \(it lacks parts\)"):
        load_compressed(images(), file)


@pytest.mark.parametrize(
    ("key", "value"), [("weights", [1]), ("weights", {"0.weight": 3}), ("flows", 3), ("config", [1]), ("versions", 3)]
)
def test_parts_of_a_file_of_another_kind_are_refused(key, value, small, tmp_path):
    tensors, described = read_file(save_weights(small, tmp_path / "small"))
    (described if key == "versions" else described["changes"][0])[key] = value
    file = write_file(tmp_path / "forged", tensors, described)
    with pytest.raises(ValueError, match=r"forged says of a compressed network .* not understand"):
        load_compressed(images(), file)


def test_what_is_no_json_is_refused(small, tmp_path):
    tensors = {name: value.clone() for name, value in small.state_dict().items()}
    for text in ("{", "[" * 100_000):
        save_file(tensors, tmp_path / "forged", metadata={"structure": "{}", "changes": text})
        with pytest.raises(ValueError, match="forged is damaged, what it says of its tensors is no JSON"):
            load_compressed(images(), tmp_path / "forged")


def test_maps_larger_than_the_tensors_of_a_file_are_never_made(small, tmp_path):
    tensors, described = read_file(save_weights(small, tmp_path / "small"))
    settings = {"in_features": 2**30, "out_features": 2**30}
    described["changes"][0]["root"] = {
        "whole": "",
        "parts": {"8": {"kind": "Linear", "settings": settings, "parts": {}}},
    }
    file = write_file(tmp_path / "forged", tensors, described)
    with pytest.raises(ValueError, match="of the shape"):
        load_compressed(images(), file)


def test_what_a_file_cannot_say_is_told_when_it_is_saved(tmp_path):
    class Other(nn.Tanh):
        """A layer whose copies are of other classes."""

        def __deepcopy__(self, memo):
            return type("Next", (type(self),), {})()

    small = compress(nn.Sequential(Other(), images()), [X], remove=1, choices=["remove"]).model
    with pytest.raises(ValueError, match=r"network is compressed, and .* cannot say how '0', Next, is made"):
        save_weights(small, tmp_path / "odd")


def test_the_structure_is_json_and_goes_with_copies(small):
    assert json.loads(json.dumps(changes_of(small))) == changes_of(small)
    assert changes_of(copy.deepcopy(small)) == changes_of(small)
    assert not any("_origin_in_whole" in vars(module) for module in small.modules())
    assert [name for name, one in small.named_modules() if hasattr(one, CHANGES)] == [""]


@pytest.mark.slow
def test_a_compressed_network_comes_back_in_a_fresh_process(tmp_path):
    small = compress(vit(), [torch.rand(24, 3, 16, 16)], remove=2, choices=["seam", "fit"]).model
    save_weights(small, tmp_path / "small.safetensors")
    x = torch.rand(2, 3, 16, 16)
    torch.save([x, small(x)], tmp_path / "outputs.pt")
    code = f"""
import pickle, torch
torch.set_num_threads({torch.get_num_threads()})
from tests.odenets.depth.compression.test_loading import vit, load_compressed
x, wanted = torch.load({str(tmp_path / "outputs.pt")!r}, weights_only=True)
whole = vit()
pickle.load = pickle.loads = pickle.Unpickler = None
assert torch.equal(load_compressed(whole, {str(tmp_path / "small.safetensors")!r})(x), wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
