"""Models in a bucket, on a real S3 endpoint over HTTP."""

from pathlib import Path

import pytest

from registry.store import Bucket
from tasks.errors import TeacherRejected
from tasks.models.teacher import load_teacher
from tests.registry.conftest import s3_place, s3_url

__all__ = ["s3_place", "s3_url"]  # fixtures

MODEL = "forge/tiny"


@pytest.fixture
def model_url(s3_place: str, tiny_teacher: Path) -> str:
    """The tiny teacher in the bucket, beside what no model folder is made of."""
    place, _, query = s3_place.partition("?")
    url = f"{place}/{MODEL}?{query}"
    bucket = Bucket(url)
    for path in tiny_teacher.rglob("*"):
        if path.is_file():
            bucket.put(path.relative_to(tiny_teacher).as_posix(), path.read_bytes())
    bucket.put("pytorch_model.bin", b"pickled")
    return url


def test_model_in_a_bucket_is_the_model_in_a_folder(model_url: str, tiny_teacher: Path, home: Path) -> None:
    found, own = load_teacher.fn(model_url), load_teacher.fn(str(tiny_teacher))
    assert (found.name, found.uri) == ("tiny", model_url)
    assert found.folder.is_relative_to(home)
    assert not (found.folder / "pytorch_model.bin").exists()
    for path in found.folder.rglob("*.*"):
        assert path.read_bytes() == (tiny_teacher / path.relative_to(found.folder)).read_bytes()
    assert (found.num_parameters, found.pooling, found.dimension) == (own.num_parameters, own.pooling, own.dimension)


def test_model_is_fetched_again_only_when_it_has_changed(model_url: str) -> None:
    first = load_teacher.fn(model_url)
    mark = first.folder / "modules.json"
    time = mark.stat().st_mtime_ns
    assert load_teacher.fn(model_url).folder == first.folder
    assert mark.stat().st_mtime_ns == time
    bucket = Bucket(model_url)
    head = bucket.head("modules.json")
    assert head is not None
    bucket.put("modules.json", mark.read_bytes() + b"\n", etag=head.etag)
    changed = load_teacher.fn(model_url)
    assert changed.folder != first.folder
    assert changed.digest != first.digest


def test_bucket_without_a_model_or_without_a_server_says_so(s3_place: str, home: Path) -> None:
    with pytest.raises(TeacherRejected, match=r"model s3://registry/\w+ holds none of \*\.json, .*give a model folder"):
        load_teacher.fn(s3_place)
    Bucket(s3_place).put("readme.txt", b"no model")
    with pytest.raises(TeacherRejected, match=r"has no modules\.json"):
        load_teacher.fn(s3_place)
    nowhere = s3_place.replace("s3://registry", "s3://nowhere")
    with pytest.raises(TeacherRejected, match=r"model s3://nowhere/\w+ cannot be fetched: .*NoSuchBucket"):
        load_teacher.fn(nowhere)


def test_file_that_would_leave_the_models_folder_is_refused(s3_place: str, home: Path) -> None:
    Bucket(s3_place).put("a/../../evil.json", b"{}")
    with pytest.raises(TeacherRejected, match=r"'a/\.\./\.\./evil\.json', which leaves its folder"):
        load_teacher.fn(s3_place)
    assert not list(home.rglob("evil.json"))
