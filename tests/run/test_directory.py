from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.config.load import dump
from launcher.config.schema import RunConfig
from launcher.errors import MachineError, RequestError, RunDirectoryError
from launcher.plan.batch import NOTHING_DONE, Done
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.orders import Orders, format_orders
from launcher.run.directory import (
    RunDirectory,
    check_goes_on,
    check_no_run,
    check_same_run,
    check_writable,
    configuration_hash,
    find_model_folder,
    has_begun,
    hold,
    is_held,
    run_directory,
    write_files,
    write_text,
)


def asked(train: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "model": {"name": "gpt2"},
            "data": {"train": ["text"]},
            "train": {"batch_size": 8, "steps": 100, **(train or {})},
            **keys,
        }
    )


def planned(run: RunConfig, done: Done = NOTHING_DONE) -> Plan:
    place = Place("here", 1, 1, find_gpu("cpu"))
    return make_plan(run, place, shape=None, positions=None, blocks=None, done=done)


def made(root: Path, run: RunConfig) -> RunDirectory:
    """A run directory with the two files that say which run it is."""
    directory = RunDirectory(root)
    orders = Orders("0", configuration_hash(run), planned(run), {"model_type": "gpt2"}, None, str(STORE), 300)
    write_files([(directory.config, dump(run)), (directory.orders, format_orders(orders))])
    return directory


STORE = Path("/stores/0123")


def begun(directory: RunDirectory) -> RunDirectory:
    """The run after its first line of metrics."""
    write_text(directory.metrics, '{"step": 1, "loss": 3.0}\n')
    return directory


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_path_is_inside_and_no_two_are_the_same() -> None:
    directory = RunDirectory(Path("/runs/small"))
    paths = [
        getattr(directory, name) for name, kind in vars(RunDirectory).items() if isinstance(kind, property)
    ]
    paths += [directory.log(1, 0), directory.log(1, 1), directory.log(2, 0), directory.launch_log(1)]
    paths += [directory.record(1, 0), directory.record(1, 1), directory.failed(1)]
    assert len(paths) == len(set(paths)) > 15
    assert all(path.is_relative_to(directory.root) for path in paths)
    assert directory.log(1, 0) == Path("/runs/small/logs/attempt-001/rank-0.log")


def test_attempts_count_on_from_the_newest(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.next_attempt() == 1
    directory.logs(1).mkdir(parents=True)
    directory.logs(1000).mkdir()
    directory.logs(9).mkdir()
    assert directory.next_attempt() == 1001


def test_a_run_lives_in_its_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_directory(asked()).root == tmp_path / "runs" / "small"
    monkeypatch.setenv("HOME", "/home/someone")
    assert run_directory(asked(output_dir="~/made")).root == Path("/home/someone/made/small")


def test_the_hash_is_the_configurations_and_not_the_order_of_its_keys(tmp_path: Path) -> None:
    assert configuration_hash(asked()) == configuration_hash(
        RunDirectory(made(tmp_path, asked()).root).read_config()
    )
    extra = [{"optim_args": "a", "debug": "b"}, {"debug": "b", "optim_args": "a"}]
    one, other = (configuration_hash(asked(train={"extra": each})) for each in extra)
    assert one == other
    assert configuration_hash(asked(seed=1)) != configuration_hash(asked())


def test_a_new_or_empty_folder_and_the_same_run_are_fine(tmp_path: Path) -> None:
    check_same_run(RunDirectory(tmp_path / "new"), asked())
    check_same_run(RunDirectory(tmp_path), asked())
    check_same_run(made(tmp_path / "small", asked()), asked())


def test_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    directory = begun(made(tmp_path / "small", asked(model={"name": "gpt2", "overrides": {"n_layer": 2}})))
    before = everything(tmp_path)
    now = asked(
        train={"learning_rate": 0.5, "early_stopping": {"patience": 2}},
        model={"name": "gpt2", "overrides": {"n_head": 4}},
    )
    with pytest.raises(RunDirectoryError) as refused:
        check_same_run(directory, now)
    message = refused.value.message
    for part in (
        "train.learning_rate was 0.0006, is now 0.5",
        "model.overrides.n_layer was 2, is now null",
        "model.overrides.n_head was null, is now 4",
        "train.early_stopping.patience was null, is now 2",
    ):
        assert part in message
    assert "another name" in (refused.value.hint or "")
    assert everything(tmp_path) == before


def test_length_and_place_may_change(tmp_path: Path) -> None:
    directory = begun(made(tmp_path / "small", asked()))
    check_same_run(directory, asked(train={"steps": 200}))
    check_same_run(directory, asked(train={"steps": None, "epochs": 2.0}, output_dir="elsewhere"))
    check_same_run(directory, asked(train={"batch_size": 12, "micro_batch": 4}))
    check_same_run(directory, asked(data={"train": ["text"], "skip": {"steps": [120], "documents": ["a:1"]}}))
    told = {"report_to": [], "push_to_hub": "a/b", "checkpoint": {"every": 5, "keep": 1}}
    check_same_run(directory, asked(train={"log_every": 3}, **told))
    with pytest.raises(RunDirectoryError, match="1 key differs: seed was 1337, is now 3"):
        check_same_run(directory, asked(train={"steps": 200}, seed=3))


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(RunDirectoryError, match="exists and is not a run directory"):
        check_same_run(RunDirectory(tmp_path), asked())
    with pytest.raises(RunDirectoryError, match="exists and is not a run directory"):
        check_same_run(RunDirectory(tmp_path / "precious"), asked())


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    directory = made(tmp_path / "small", asked())
    directory.config.write_text("name: small\nmodel: [")
    for look in (lambda: check_same_run(directory, asked()), directory.read_config):
        with pytest.raises(RunDirectoryError, match=r"config\.yaml cannot be read") as refused:
            look()
        assert "mend that file" in (refused.value.hint or "")


def test_a_run_may_grow_but_not_shrink(tmp_path: Path) -> None:
    directory = begun(made(tmp_path / "small", asked(train={"steps": 1000})))
    for length in ({"steps": 1000}, {"steps": 1001}, {"steps": None, "epochs": 3}):
        check_goes_on(directory, planned(asked(train=length)), STORE)
    with pytest.raises(RunDirectoryError, match="planned for 1,000 steps, and 999 are asked for"):
        check_goes_on(directory, planned(asked(train={"steps": 999})), STORE)


def test_with_larger_steps_fewer_of_them_are_no_shorter_run(tmp_path: Path) -> None:
    directory = begun(made(tmp_path / "small", asked(train={"steps": 1000})))
    half = Done(500, 4000, 20)
    larger = planned(asked(train={"batch_size": 24, "steps": 667}), half)
    rounded = planned(asked(train={"batch_size": 12, "steps": 833}), half)
    assert (larger.samples, rounded.samples) == (8008, 7996)
    check_goes_on(directory, larger, STORE)
    check_goes_on(directory, rounded, STORE)
    check_goes_on(directory, planned(asked(train={"batch_size": 2, "steps": 1000}), half), STORE)
    shorter = planned(asked(train={"batch_size": 24, "steps": 666}), half)
    assert shorter.samples == 7984
    with pytest.raises(RunDirectoryError, match="planned for 1,000 steps, and 666 are asked for"):
        check_goes_on(directory, shorter, STORE)


def test_a_run_goes_on_with_the_text_it_began_with(tmp_path: Path) -> None:
    directory = begun(made(tmp_path / "small", asked()))
    check_goes_on(directory, planned(asked()), Path("/moved/stores/0123"))
    with pytest.raises(RunDirectoryError, match="text or tokenizer of run 'small' has changed") as refused:
        check_goes_on(directory, planned(asked()), Path("/stores/4567"))
    assert "/stores/0123" in refused.value.message
    assert "/stores/4567" in refused.value.message


def test_until_something_was_trained_a_mistake_may_be_mended(tmp_path: Path) -> None:
    directory = made(tmp_path / "small", asked())
    directory.metrics.touch()
    directory.logs(1).mkdir(parents=True)
    assert not has_begun(directory)
    check_same_run(directory, asked(seed=3))
    one = planned(asked(train={"steps": 1}))
    check_goes_on(directory, one, Path("/stores/4567"))
    (directory.checkpoints / "step-00000010").mkdir(parents=True)
    assert has_begun(directory)
    check_goes_on(RunDirectory(tmp_path / "new"), one, STORE)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"not a run directory: it has no config\.yaml"):
        directory.read_config()
    with pytest.raises(RunDirectoryError, match=r"not a run directory: it has no plan\.json"):
        directory.read_orders()


def test_the_model_of_a_run_of_a_folder_and_of_the_hub(tmp_path: Path) -> None:
    directory = made(tmp_path / "small", asked())
    with pytest.raises(RunDirectoryError, match="no model yet") as caught:
        find_model_folder(str(directory.root))
    assert f"`launcher checkpoint export {directory.root}`" in (caught.value.hint or "")
    directory.model.mkdir()
    assert find_model_folder(str(directory.root)) == directory.model
    with pytest.raises(RequestError, match=r"it has no config\.json; it holds nothing"):
        find_model_folder(str(directory.model))
    (directory.model / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RequestError, match=r"no tokenizer in .*: it has no tokenizer\.json") as refused:
        find_model_folder(str(directory.model))
    assert "launcher checkpoint export RUN_DIR" in (refused.value.hint or "")
    (directory.model / "tokenizer.json").write_text("{}")
    assert find_model_folder(str(directory.model)) == str(directory.model)
    assert find_model_folder("openai-community/gpt2") == "openai-community/gpt2"


def test_a_checkpoint_of_any_engine_is_no_model_but_one_is_made_of_it(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text("{}")
    with pytest.raises(RequestError, match="is a checkpoint, not a model") as refused:
        find_model_folder(str(tmp_path))
    assert "launcher checkpoint export RUN_DIR" in (refused.value.hint or "")


@pytest.mark.parametrize("of_a_run", ["environment.json", "journal.jsonl", "checkpoints", ".lock"])
def test_a_folder_with_a_run_in_it_is_not_written_to(tmp_path: Path, of_a_run: str) -> None:
    directory = made(tmp_path / "small", asked())
    check_no_run(directory)
    (directory.root / of_a_run).mkdir()
    with pytest.raises(RunDirectoryError, match="small is the folder of a run"):
        check_no_run(directory)


def test_writing_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "plan.json"
    write_text(file, "before, and longer")
    write_text(file, "après\n")
    assert file.read_bytes() == "après\n".encode()
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new, but for \ud800")
    assert file.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without room")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_text(file, "old")
    (tmp_path / f".plan.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new" * 10_000)
    assert file.read_text() == "old"


def test_only_scripts_are_executable_and_only_for_those_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_files([(tmp_path / "launch.sh", "#!/bin/sh\n"), (tmp_path / "plan.json", "{}")])
    finally:
        os.umask(before)
    assert (tmp_path / "launch.sh").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o640


def test_writable_is_found_out_by_trying_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/runs/small"), tmp_path / "file" / "runs"):
        with pytest.raises(RequestError, match=r"data\.cache_dir: cannot write in") as refused:
            check_writable(folder, "data.cache_dir")
        assert "data.cache_dir" in (refused.value.hint or "")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """None that lacks them can be mounted here."""
    directory = RunDirectory(tmp_path)
    hold(directory.lock, directory, "us").close()

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for look in (lambda: hold(directory.lock, directory, "us"), lambda: is_held(directory.lock)):
        with pytest.raises(MachineError, match="cannot be locked") as caught:
            look()
        assert str(directory.lock) in caught.value.message
        assert "output_dir" in (caught.value.hint or "")
