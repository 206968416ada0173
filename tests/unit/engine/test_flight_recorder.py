"""The flight recorder is on unless somebody has set it otherwise, under the names that torch reads."""

from pathlib import Path

from distft.engine import flight_recorder


def test_what_is_set(tmp_path: Path) -> None:
    assert flight_recorder.variables(tmp_path, {}) == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/collectives-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def test_what_a_person_has_set_counts_more(tmp_path: Path) -> None:
    found = flight_recorder.variables(
        tmp_path, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere"}
    )
    assert found == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_this_torch_reads_those_names() -> None:
    """A name that torch no longer reads would turn the recorder off without a word."""
    import torch

    libraries = (Path(torch.__file__).parent / "lib").glob("libtorch_*.so")
    text = b"".join(path.read_bytes() for path in libraries if path.stat().st_size)
    assert flight_recorder._FILE[0].encode() in text
    assert flight_recorder._SIZE[0].encode() in text


def test_a_record_is_written_as_torch_reads_it(tmp_path: Path) -> None:
    from torch.distributed.flight_recorder.components.loader import read_dump

    flight_recorder.write(tmp_path, 3)
    said = read_dump(flight_recorder.PREFIX, str(tmp_path / "collectives-3"))
    assert said["rank"] == 3
    assert isinstance(said["entries"], list), "of whatever this process has sent"
