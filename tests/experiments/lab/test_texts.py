import pytest
from PIL import Image

from lab.photographs import crops, photographs_in
from lab.texts import prose, read_text

PAGE = """<html><head><title>A title that is rather long, longer than it need be.</title></head><body><h1>Short</h1>
<p>A paragraph with <em>marks</em> in it &amp; more words than six.</p><pre>some code that would be long enough</pre>
<ul><li>An item of a list with more words than six.</li></ul></body></html>"""


def test_of_a_page_the_sentences_are_read():
    assert prose(PAGE).splitlines() == [
        "A paragraph with marks in it & more words than six.",
        "An item of a list with more words than six.",
    ]


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "c.py").write_text("code")
    assert read_text(tmp_path).startswith("A paragraph")
    assert read_text(tmp_path).endswith("six.\n\nsecond")
    assert read_text(tmp_path / "b.txt") == "second"


@pytest.mark.parametrize("source", ["nowhere.txt", "no_such_package:a.txt", "."])
def test_a_source_that_is_not_there_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere|no_such_package|\. must be a text file"):
        read_text(source)


@pytest.fixture
def album(tmp_path):
    for name, color in (("red.png", (255, 0, 0)), ("sub/blue.jpg", (0, 0, 255))):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (50, 40), color).save(path)
    return tmp_path


def test_crops_are_cut_photograph_by_photograph_and_are_those_of_their_seed(album):
    files = photographs_in(album)
    assert [file.name for file in files] == ["red.png", "blue.jpg"]
    squares = crops(files, 3, size=8)
    assert squares.shape == (6, 3, 8, 8)
    assert squares[:3, 0].min() > 0.99 > 0.01 > squares[3:, 0].max()
    assert (squares == crops(files, 3, size=8)).all()


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder of pictures"):
        photographs_in(tmp_path)
