"""What files, checkpoints and command lines may say: no class is imported, work is bounded, nothing reads two ways."""

import io
import sys
from pathlib import Path

import pytest
import yaml

import visionattn
from visionattn.cli import main as visionattn_main
from visionattn.data.images import load_datasets
from visionattn.errors import VisionattnError, run
from visionattn.training import yaml_text
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import ResultFile, options_of
from visionattn.training.yaml_text import Plain, read, resolved, to_yaml

ZEN = {"class_path": "zen_of_visionattn.Zen", "init_args": {"a": 1}}


@pytest.fixture
def zen(tmp_path: Path, monkeypatch) -> Path:
    """A file that is there once the module was imported."""
    (tmp_path / "zen_of_visionattn.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"
        "class Zen:\n    def __init__(self, a=0): 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("zen_of_visionattn", None)


@pytest.mark.parametrize(
    "options",
    [
        ["--model_kwargs", f'{{"norm": {ZEN}}}'],
        ["--model_kwargs", f"{ZEN}"],
        ["--model_kwargs.norm", f"{ZEN}"],
        ["--model_kwargs.norm.class_path", ZEN["class_path"]],
        [f"--model-kwargs.norm.class-path={ZEN['class_path']}"],
        ["--head_kwargs", f'{{"a": [{ZEN}, {{"b": {ZEN}}}]}}', "--task", "detection"],
        ["--distill.kwargs", f'{{"norm": {ZEN}}}', "--distill.model", "x"],
        ["--optim", f"{ZEN}"],
        ["--optim", ZEN["class_path"]],
        ["--data.class_path", ZEN["class_path"]],
        ["--config", "all.yaml"],
        ["--config", "group.yaml"],
        ["--config", "named.yaml"],
        ["--config", "based.yaml"],
        ["--data", "group.yaml"],
        ["--resume", "run"],
        ["--print_config", "--config", "all.yaml"],
    ],
)
def test_no_option_imports_what_it_names(zen: Path, options: list[str]):
    Path("all.yaml").write_text(yaml.safe_dump({"model_kwargs": {"norm": ZEN}, "distill": {"kwargs": {"a": [ZEN]}}}))
    Path("group.yaml").write_text(yaml.safe_dump({"optim": ZEN}))
    Path("named.yaml").write_text(yaml.safe_dump({"optim": ZEN["class_path"]}))
    Path("based.yaml").write_text("base: all.yaml\n")
    Path("run").mkdir()
    Path("run/config.yaml").write_text(Path("all.yaml").read_text())
    try:
        config, _ = parse_train(options)
    except (VisionattnError, SystemExit):
        pass  # refused, which is as well
    else:
        assert ZEN["class_path"] in repr(config)  # kept as it is
    assert not zen.exists()


def test_no_checkpoint_imports_what_its_header_names(zen: Path, capsys):
    model = visionattn.create_model("test_dinat", num_classes=10)
    for name, entries in {
        "free": {"model_kwargs": {"num_classes": 10, "norm": ZEN}},
        "group": {"data": ZEN},
        "value": {"data": {"img_size": ZEN}},
        "head": {"task": "detection", "head": "fcos", "head_kwargs": {"norm": ZEN}},
    }.items():
        known = {"model": "test_dinat", "model_kwargs": {"num_classes": 10}, "classes": list("0123456789"), "data": {}}
        save_checkpoint(Path(f"{name}.safetensors"), model.state_dict(), known | entries)
        try:
            parse_validate(["--checkpoint", f"{name}.safetensors"], options_of)
            options = dict(entries)
            options.setdefault("data", {})
            parse_validate(["--checkpoint", "x"], lambda checkpoint, options=options: options)
        except VisionattnError:
            pass
        assert visionattn_main(["predict", "x.png", "--checkpoint", f"{name}.safetensors"]) == 2
    assert not zen.exists() and capsys.readouterr().err.count("\n") == 4


def bomb(entry: str, depth: int = 9) -> str:
    lines = [f"  k{i}: &a{i} {entry.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, depth + 1)]
    return "model_kwargs:\n  k0: &a0 {x: 1}\n" + "".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb("[{}]"), "more than 100000 values, those behind aliases included"),
        (bomb("{{<<: [{}]}}", 30), "more than 100000 values"),
        ("a: &a [*a]", r"line 1: \*a stands inside what it names"),
        ("a: &a {b: {c: *a}}", "stands inside what it names"),
        ("&a\na: *a", r"line 2: \*a stands inside"),
        ("a: &a {<<: *a}", "stands inside"),
        ("a: *b", "nothing is called &b .line 1"),
        ("a: {b: 1, b: 2}", "b is given twice .in line 1 and line 1"),
        ("a:\n  - b: 1\n    c: 2\n    b: 3", "b is given twice .in line 2 and line 4"),
        ("a: {<<: {b: 1}, <<: {b: 2}}", "<< is given twice"),
        ("a: {<<: 3}", "<< takes an alias of a mapping"),
        ("a: {1: 2}", "line 1: expected a name as `name: value`, got 1"),
        ("~: 2", "expected a name as `name: value`, got ~"),
        ("? [a]\n: 2", "expected a name as `name: value`, got a list"),
        ("true: 2", "expected a name as `name: value`, got true"),
        ("a: !!python/object/apply:os.system [ls]", "the tag .*os.system is not read"),
        ("a: !!python/name:os.system ''", "the tag .*os.system is not read"),
        ("a: !!set {x}", "the tag .*set is not read"),
        ("a: !!timestamp 2020-01-01", "the tag .*timestamp is not read"),
        ("a: !mine 3", "the tag !mine is not read"),
        ("a: !!int x", "'x' with the tag .*int is not read"),
        ("a: 1\n---\na: 2", "a second document begins in line 2"),
        ("a: " + "[" * 5000, "line 1 is nested more than 50 deep"),
        ("\n".join(" " * i + "a:" for i in range(200)), "line 51 is nested more than 50 deep"),
        ("a: [", "expected the node content"),
        ("a: b\x00", "unacceptable character"),
    ],
)
def test_a_text_that_is_no_options_is_refused(tmp_path: Path, text: str, told: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(VisionattnError, match=f"cannot read .*a.yaml: .*{told}") as caught:
        yaml_text.read_file(tmp_path / "a.yaml", f"cannot read {tmp_path / 'a.yaml'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: é\n".encode("utf-16"), "é"),
        (b"\xfe\xff" + "name: x".encode("utf-16-be"), "x"),
        (b"\xef\xbb\xbfname: x\n", "x"),
        (b"name: caf\xe9\n", "not a text in UTF-8"),
        (bytes(range(256)), "not a text in UTF-8"),
        (b"#" + b"x" * 2**18, "larger"),
    ],
)
def test_files_are_texts_of_a_size(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "a.yaml").write_bytes(content)
    try:
        assert yaml_text.read_file(tmp_path / "a.yaml", "cannot read a.yaml")["name"] == Plain(expected)
    except VisionattnError as error:
        assert expected in str(error)


def test_no_file_is_read_without_end():
    with pytest.raises(VisionattnError, match="cannot read zero: .* larger"):
        yaml_text.read_file(Path("/dev/zero"), "cannot read zero")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim: 3", "option optim: expected options as `name: value`, got 3 .line 1"),
        ("optim: [3]", "option optim: expected options as `name: value`, got a list"),
        ("seed: 3\noptim:", "option optim: expected options as `name: value`, got null .line 2"),
        ("model_kwargs: null", "option model_kwargs: expected options"),
        ("model_kwargs: [1]", "option model_kwargs: expected options"),
        ("epochs: null", "option epochs: expected a whole number above 0, got null"),
        ("epochs: 1" + "0" * 400, "option epochs: a whole number as large as that"),
        ("epochs: 1" + "0" * 5000, "option epochs: a whole number as large as that"),
        ("epochs: 3.5", "option epochs: expected a whole number above 0, got 3.5"),
        ("epochs: {a: 1}", "option epochs: expected a whole number above 0, got a mapping"),
        ("epochs: many", "option epochs: expected a whole number above 0, got 'many'"),
        ("name: null", "option name: expected str, got null"),
        ("optim: {lr: .inf}", "option optim.lr: expected a finite number"),
        ("optim: {lr: 1e999}", "option optim.lr: expected a finite number"),
        ("model_kwargs: {a: [.nan]}", "option model_kwargs: expected a finite number"),
        ("config: b.yaml", "config is for the command line alone"),
        ("resume: run", "resume is for the command line alone"),
        ("help: 1", "help is for the command line alone"),
        ("freeze+: [a]", r"unknown option freeze\+"),
        ("data: {batch_size: 2}\ndata.batch_size: 4", "option data.batch_size is given twice .line 2"),
        ("epochs: 1\nepochs: 2", "epochs is given twice .in line 1 and line 2"),
        ("seed: 010", "option seed: 010 reads as a number that begins with 0"),
        ("seed: 0o17", "option seed: 0o17 reads as a number that begins with 0"),
        ("seed: 12:30:00", "option seed: 12:30:00 reads as a time or a number to base 60"),
        ("model_kwargs: {a: 2024-01-01}", "option model_kwargs: 2024-01-01 reads as a date"),
        ("model_kwargs: {a: {b: [010]}}", "option model_kwargs: 010 reads as a number that begins with 0"),
        ("joint: {scale: [0.5, a]}", "option joint.scale: expected a number above 0, got 'a'"),
        ("- 1", "expected options as `name: value`, got list"),
        ("3", "expected options as `name: value`, got 3"),
        ("base: {a: b}", "option base is a file or a list of files"),
    ],
)
def test_wrong_options_are_told_by_file_name_and_line(tmp_path: Path, text: str, told: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(VisionattnError, match=f"a.yaml: {told}") as caught:
        parse_train(["--config", str(tmp_path / "a.yaml")])
    assert "\n" not in str(caught.value)


def test_values_are_read_as_their_options_take_them(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "name: 2024-01-01\nprecision: no\npretrained: yes\ndata: {root: 010, train_split: off, img_size: [32, 40]}\n"
        "optim: {lr: 1e-3, betas: [.9, 1_0.5e-1]}\nfreeze: [stem, 3, no]\nseed: '7'\nepochs: !!int '9'\n"
        "model_kwargs: {a: &a {x: 1, y: 2}, b: {<<: *a, y: '3'}, c: off, d: '1e-3', e: 0x1F, f: ~}\n"
        "model_kwargs.g.h: 1_000\nloss: {class_weights: balanced}\n"
    )
    config, _ = parse_train(["--config", str(tmp_path / "a.yaml"), "--output", "1e3", "--name", "null"])
    assert (config.name, config.precision, config.pretrained, config.seed, config.epochs) == ("null", "no", True, 7, 9)
    data = config.data
    assert (data.root, data.train_split, config.output, data.img_size) == ("010", "off", "1e3", (32, 40))
    assert config.optim.lr == 1e-3 and config.optim.betas == (0.9, 1.05) and config.freeze == ("stem", "3", "no")
    assert config.model_kwargs == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": "3"}, "c": False, "d": "1e-3", "e": 31, "f": None, "g": {"h": 1000},
    }  # fmt: skip
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "again.yaml")])[0] == config


@pytest.mark.parametrize(
    "text", ["no", "010", "0o7", "1e5", "12:30", "2024-01-01", "null", "", "a\nb", "\udce9", "'", "3"]
)
def test_texts_stay_texts_in_the_files_of_runs(tmp_path: Path, text: str):
    config, _ = parse_train([])
    config.model_kwargs, config.name = {"a": text, "b": {"1": [text]}}, text
    assert resolved(read(to_yaml(config)))["model_kwargs"] == config.model_kwargs
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--seed", "010"], "option seed: 010 reads as a number that begins with 0"),
        (["--seed", "12:30"], "to base 60"),
        (["--epochs", "1" + "0" * 400], "option epochs: a whole number as large"),
        (["--optim.lr", "inf"], "option optim.lr"),
        (["--optim", "3"], "cannot read 3, which option optim names"),
        (["--model_kwargs", "[1]"], "option model_kwargs: expected options"),
        (["--model_kwargs", "{a: *b}"], "option model_kwargs: nothing is called &b"),
        (["--model_kwargs", "{a: 1, a: 2}"], "option model_kwargs: a is given twice"),
        (["--model_kwargs.a", "[" * 100], "nested more than 50 deep"),
        (["--model_kwargs." + "a." * 100, "1"], "nested too deep"),
        (["--seed"], "option seed: expected one argument"),
        (["--se\ned", "1"], r"unknown option --se\\ned"),
        (["st\nray"], r"unexpected argument 'st\\nray'"),
    ],
)
def test_wrong_arguments_are_told_by_their_option(argv: list[str], told: str):
    with pytest.raises(VisionattnError, match=told) as caught:
        parse_train(argv)
    assert "\n" not in str(caught.value)


def test_entries_of_a_checkpoint_are_told_by_its_name():
    for options, told in (
        ({"data": {"batch_size": "many"}}, "w.safetensors: option data.batch_size: expected a whole number .*'many'"),
        ({"data": {"batch_size": 10**400}}, "w.safetensors: option data.batch_size: a whole number as large"),
        ({"data": {"from_the_future": 1}}, "w.safetensors: unknown option data.from_the_future"),
        ({"data": 3}, "w.safetensors: option data: expected options as `name: value`, got 3"),
        ({"model_kwargs": None}, "w.safetensors: option model_kwargs: expected options"),
        ({"task": "depth"}, "w.safetensors: option task"),
        ({"joint": {"scale": [float("nan"), 1]}}, "w.safetensors: option joint.scale: expected a finite number"),
    ):
        with pytest.raises(VisionattnError, match=told):
            parse_validate(["--checkpoint", "w.safetensors"], lambda checkpoint, options=options: options)


def test_the_command_line_wins_over_files_over_the_checkpoint(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("model_kwargs: {b: 2}\ndata: {eval_batch_size: 8}\n")
    argv = ["--checkpoint", "w", "--config", str(tmp_path / "a.yaml"), "--data", "{num_workers: 0}"]
    brought = {"model_kwargs": {"a": 1, "b": 1}, "data": {"eval_batch_size": 4, "num_workers": 3, "crop_pct": 0.5}}
    config = parse_validate([*argv, "--model_kwargs.c", "3"], lambda checkpoint: brought)
    assert config.model_kwargs == {"a": 1, "b": 2, "c": 3}
    assert (config.data.eval_batch_size, config.data.num_workers, config.data.crop_pct) == (8, 0, 0.5)


def test_a_base_of_many_files_is_read_once(tmp_path: Path):
    """Files that each name two bases, ten deep, would else be read a thousand times."""
    for i in range(10):
        (tmp_path / f"{i}.yaml").write_text(f"base: [{i + 1}.yaml, {i + 1}.yaml]\nseed: {i}\n")
    (tmp_path / "10.yaml").write_text("epochs: 3\n")
    config, _ = parse_train(["--config", str(tmp_path / "0.yaml")])
    assert (config.epochs, config.seed) == (3, 0)


def test_names_that_are_no_text_are_told_and_written(tmp_path: Path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert run(lambda argv: print("runs/caf\udce9", flush=True)) == 0
    assert out.buffer.getvalue() == b"runs/caf\\udce9\n"
    ResultFile(tmp_path / "r.csv").add({"model": "m", "weights": "caf\udce9.safetensors"})
    assert (tmp_path / "r.csv").read_text() == "model,weights\nm,caf\\udce9.safetensors\n"


@pytest.mark.parametrize("option", ["--data.root", "--config", "--resume"])
def test_paths_that_no_system_has_are_one_line(option: str, monkeypatch, capsys):
    def main(argv: list[str]) -> None:
        load_datasets(parse_train([option, "x" * 5000])[0].data)

    assert run(main) == 2
    out, err = capsys.readouterr()
    known = ("error: cannot ", "error: image folder ")  # from Python 3.14 on such a path is just not there
    assert not out and err.startswith(known) and err.count("\n") == 1, err


def test_errors_of_scripts_are_one_line(monkeypatch, capsys):
    def main(argv: list[str]) -> None:
        raise VisionattnError("no model a\nb\x1b[2J\u202e\udce9")

    assert run(main) == 2
    assert capsys.readouterr().err == "error: no model a\\nb\\x1b[2J\\u202e\\udce9\n"
    for argv in (
        ["info", "a\nb"],
        ["x\ny"],
        ["predict", "--threshold", "a\nb"],
        ["list", "--a\rb"],
        ["push", "a\nb", "c"],
    ):
        assert visionattn_main(argv) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and err.strip().isprintable(), err


def test_help_tells_what_compiling_many_sizes_does(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "torch goes on uncompiled (torch._dynamo.config.recompile_limit)" in told
