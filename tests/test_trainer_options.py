"""What the options of the trainer do: files with bases, freezing, rates, schedules, losses, distillation, execution."""

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.nn import functional as F

import visionattn
from visionattn.data.config import AugmentConfig, DataConfig
from visionattn.data.images import ImageSet, load_datasets
from visionattn.data.transforms import eval_transform
from visionattn.errors import VisionattnError
from visionattn.tasks.classification import ClassificationLoss
from visionattn.tasks.config import LossConfig
from visionattn.training import run
from visionattn.training.build import freeze
from visionattn.training.checkpoint import read_saved, save_checkpoint, training_state
from visionattn.training.config import DistillConfig, OptimConfig, ScheduleConfig, TrainConfig, parse_train
from visionattn.training.distill import Distillation
from visionattn.training.guard import Stopped
from visionattn.training.logging import RunLog
from visionattn.training.optim import Schedule, make_optimizer
from visionattn.training.run import train
from visionattn.training.trainer import Trainer

PREPARED = DataConfig(
    img_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0, crop_mode="center"
)
QUICK = ["--data.val_fraction", "0.8", "--data.num_workers", "0", "--epochs", "2", "--data.batch_size", "32"]


def trainer(tmp_path: Path, *options: str) -> Trainer:
    return Trainer(*parse_train([*QUICK, "--output", str(tmp_path), *options]))


def test_files_are_read_over_their_bases(tmp_path: Path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "data.yaml").write_text("data: {batch_size: 8, num_workers: 0}\nseed: 3\n")
    (tmp_path / "parts" / "long.yaml").write_text("base: data.yaml\nepochs: 300\nmodel_kwargs: {drop_path_rate: 0.1}\n")
    (tmp_path / "mine.yaml").write_text(
        "base: [parts/long.yaml]\ndata: {batch_size: 16}\nmodel_kwargs: {drop_rate: 0}\n"
    )
    config, _ = parse_train(["--config", str(tmp_path / "mine.yaml"), "--seed", "5"])
    assert (config.epochs, config.seed, config.data.batch_size, config.data.num_workers) == (300, 5, 16, 0)
    assert config.model_kwargs == {"drop_path_rate": 0.1, "drop_rate": 0}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, "lead back to it"),
        ({"a": "base: b.yaml"}, "a.yaml: base .*b.yaml"),
        ({"a": "base: b.yaml", "b": "data: {bach_size: 3}"}, "b.yaml: unknown option data.bach_size.*batch_size"),
        ({"a": "base: b.yaml", "b": "epochs: 0"}, "b.yaml: option epochs"),
        ({"a": "base: 3"}, "option base"),
        ({"a": "- 1"}, "a.yaml: expected options"),
    ],
)
def test_bad_bases_are_told_by_file_and_option(tmp_path: Path, files: dict[str, str], told: str):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(VisionattnError, match=told):
        parse_train(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("model", "parts", "learns"),
    [
        ("test_van", ("stem", "stages.0", "stages.1-2"), ("stages.3.", "norm", "head")),
        ("test_convit", ("blocks.0-1", "cls_token"), ("stem", "pos_embed", "blocks.2", "blocks.3", "norm", "head")),
        ("test_van", ("backbone",), ("head",)),
    ],
)
def test_frozen_parts_keep_weights_and_statistics(tmp_path: Path, model: str, parts: tuple[str, ...], learns):
    run = trainer(tmp_path, "--model", model, "--freeze", f"[{','.join(parts)}]", "--epochs", "1")
    before = {name: value.clone() for name, value in run.bare_model.state_dict().items()}
    run.fit()
    for name, value in run.bare_model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(learns) or not value.is_floating_point(), name


@pytest.mark.parametrize("name", visionattn.list_models("test_*"))
def test_a_frozen_backbone_runs_as_in_validation_but_drops_before_the_head(name: str):
    rates = {"drop_rate": 0.5, "drop_path_rate": 0.5}
    rates |= {"soft_mask_epochs": 1.0} if name == "test_illama" else {}
    model = visionattn.create_model(name, num_classes=10, **rates)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().forward_features(x)
        for module in freeze(model.train(), ("backbone",)):
            module.eval()
        features = model.forward_features(x)
        torch.testing.assert_close(features, expected)
        dropped = not torch.equal(model.forward_head(features), model.forward_head(features))
        assert dropped == (name != "test_illama")  # which drops after the position embedding alone


def test_frozen_blocks_follow_no_schedule_and_learn_no_map():
    x = torch.randn(2, 3, 32, 32)
    model = visionattn.create_model("test_illama", soft_mask_epochs=1.0)
    with torch.no_grad():
        expected = model.eval().forward_intermediates(x, [0, 1], intermediates_only=True)
        for module in freeze(model.train(), ("blocks.0",)):
            module.eval()
        found = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert torch.equal(found[0], expected[0]) and not torch.allclose(found[1], expected[1], atol=1e-5)
    model = visionattn.create_model("test_sparsifiner", phase="recon")
    model.learn_from(visionattn.create_model("test_sparsifiner", attn_keep_rate=1))
    for module in freeze(model.train(), ("blocks.0",)):
        module.eval()
    model.training_loss(torch.zeros(()), x, model(x)).backward()
    learned = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"1", "2", "3"}


def test_freezing_what_is_not_there_is_refused():
    model = visionattn.create_model("test_van")
    with pytest.raises(VisionattnError, match="no stages.7; its parts are stem, stages"):
        freeze(model, ("stages.7",))
    with pytest.raises(VisionattnError, match="nothing to learn"):
        freeze(model, ("backbone", "head"))


def test_a_model_may_have_parameters_learn_at_another_rate():
    model = visionattn.create_model("test_litv2")
    optimizer = make_optimizer(OptimConfig(lr=1e-3), model, model.learning_rates())
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        lr, decay = rates[id(parameter)]
        assert lr == pytest.approx(1e-5 if name.endswith("offset.weight") else 1e-3), name
        assert decay == (0 if parameter.ndim == 1 else 0.05), name


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "lion", "muon", "adafactor"])
def test_optimizers_train(tmp_path: Path, name: str):
    run = trainer(tmp_path, "--optim.name", name, "--optim.lr", "1e-3", "--optim.layer_decay", "0.8")
    next(run.run_updates())
    before = run.bare_model.head.weight.clone()
    loss = next(run.run_updates())
    assert math.isfinite(loss) and not torch.equal(run.bare_model.head.weight, before)


def tiny() -> nn.Module:
    """A model with weights of every number of axes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
    for i in range(first, first + 3):
        torch.manual_seed(i)
        images, labels = torch.randn(8, 2, 4, 4), torch.randint(0, 4, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


REFUSED = ("adahessian", "kron", "bnb", "fused")


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_goes_on_with_the_same_bits_or_is_refused(tmp_path: Path, name: str):
    options, model = OptimConfig(name=name, lr=1e-2), tiny()
    try:
        optimizer = make_optimizer(options, model)
    except VisionattnError as error:  # some for want of a package, or of a GPU
        assert name.startswith(REFUSED) and str(error).startswith(f"optimizer {name}") and "\n" not in str(error)
        return
    assert not name.startswith(("adahessian", "kron"))
    before = model[4].weight.clone()
    steps(model, optimizer, 0)
    assert not torch.equal(model[4].weight, before) and model[4].weight.isfinite().all()
    save_checkpoint(tmp_path / "c.safetensors", model.state_dict(), {}, optimizer.state_dict())
    again = tiny()
    again.load_state_dict({k: v for k, v in load_file(tmp_path / "c.safetensors").items() if k in model.state_dict()})
    other = make_optimizer(options, again)
    other.load_state_dict(training_state(read_saved(tmp_path / "c.safetensors")))
    steps(model, optimizer, 3)
    steps(again, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_optimizer_that_cannot_serve_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(VisionattnError, match="adahessian needs second derivatives"):
        trainer(tmp_path, "--optim.name", "adahessian")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.99, 0.999)])
def test_another_number_of_betas_is_refused(betas: tuple[float, ...]):
    with pytest.raises(VisionattnError, match=f"optimizer adamw takes 2 betas: optim.betas has {len(betas)}"):
        make_optimizer(OptimConfig(betas=betas), nn.Linear(2, 2))


def rates(epochs: int = 10, updates: int = 4, scores: tuple[float, ...] = (), **options) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = TrainConfig(epochs=epochs, schedule=ScheduleConfig(**{"min_lr": 0.01, "warmup_lr": 0.1} | options))
    schedule, found = Schedule(config, optimizer, updates), []
    for update in range(epochs * updates):
        schedule.step(update)
        found.append(optimizer.param_groups[0]["lr"])
        if scores and update % updates == updates - 1:
            schedule.observe(update // updates, scores[update // updates])
    return found


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "wsd", "onecycle"])
@pytest.mark.parametrize("prefix", [False, True])
def test_schedules_warm_up_peak_and_cool_down_on_time(name: str, prefix: bool):
    lr = rates(name=name, warmup_prefix=prefix, warmup_epochs=2, cooldown_epochs=3, decay_rate=1.0)
    assert lr[0] == pytest.approx(0.1) and lr[:8] == sorted(lr[:8]) and lr[7] < 1
    starts_after = prefix or name in ("wsd", "onecycle")
    assert lr[8] == pytest.approx(1) if starts_after else lr[8] < 1
    assert lr[8:28] == sorted(lr[8:28], reverse=True) and lr[27] > 0.011
    assert lr[28:] == pytest.approx([0.01] * 12)


def test_decays_by_steps_and_milestones_fall_on_epochs():
    for options in ({"name": "step", "decay_epochs": 3}, {"name": "multistep", "decay_milestones": (3, 6, 9)}):
        lr = rates(warmup_epochs=0, decay_rate=0.5, **options)
        assert lr == pytest.approx([0.5 ** (update // 12) for update in range(40)])


def test_plateau_waits_decays_and_resumes():
    scores = (1, 2, 2, 1, 2, 3, 3, 2, 1, 0)
    lr = rates(name="plateau", warmup_epochs=1, patience_epochs=1, decay_rate=0.1, scores=scores)
    assert lr[4:40:4] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = TrainConfig(schedule=ScheduleConfig(name="plateau", patience_epochs=0, warmup_epochs=0))
    one, other = (Schedule(config, optimizer, 4) for _ in range(2))
    for epoch, score in enumerate((3, 2, 4)):
        one.observe(epoch, score)
    other.load_state_dict(one.state_dict())
    assert other.plateau == 0.1 and other.state_dict() == one.state_dict()


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(VisionattnError, match="leave none of 5"):
        rates(epochs=5, name="cosine", warmup_prefix=True, warmup_epochs=2, cooldown_epochs=3)
    with pytest.raises(VisionattnError, match="no cool-down"):
        rates(name="step", cooldown_epochs=1)


def labelled(*labels, classes: int = 3) -> ImageSet:
    return ImageSet([(None, label) for label in labels], range(len(labels)), [str(i) for i in range(classes)], "test")


def loss_of(options: LossConfig, logits: torch.Tensor, targets: torch.Tensor, images: ImageSet) -> float:
    loss = ClassificationLoss(options, AugmentConfig(mixup=0), images, 0, lambda loss, *_: loss)
    return loss(lambda images: logits, torch.zeros(len(logits)), targets, 0).item()


def test_class_weights_scale_the_loss_of_their_class():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 0, 0, 1])
    images = labelled(0, 0, 0, 1)
    per_image = nn.functional.cross_entropy(logits, targets, reduction="none")
    for weights in ("balanced", (4 / 9, 4 / 3, 4.0)):
        weight = torch.tensor([4 / 9, 4 / 9, 4 / 9, 4 / 3])
        found = loss_of(LossConfig(0.0, class_weights=weights), logits, targets, images)
        assert found == pytest.approx((per_image * weight).mean().item(), rel=1e-5)
    ones = (1.0, 1.0, 1.0)
    for options in ({"smoothing": 0.1}, {"bce": True}, {"bce": True, "bce_sum": True, "bce_threshold": 0.2}):
        plain, weighted = (
            loss_of(LossConfig(**options, class_weights=w), logits, targets, images) for w in (None, ones)
        )
        assert plain == pytest.approx(weighted, rel=1e-5)
    with pytest.raises(VisionattnError, match="2 values for 3 classes"):
        loss_of(LossConfig(class_weights=(1.0, 2.0)), logits, targets, images)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of a timm model that knows the digits."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, stem_width=8, channels=(8, 16, 32, 64))
    digits, _ = load_datasets(DataConfig())
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    images, labels = zip(*(digits.load(i) for i in range(640)), strict=True)
    images, labels = torch.stack([eval_transform(PREPARED)(image) for image in images]), torch.tensor(labels)
    for start in 20 * list(range(0, 640, 128)):
        part = slice(start, start + 128)
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("teacher") / "resnet.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def taught(teacher: str) -> list[str]:
    options = ["--distill.model", "resnet10t", "--distill.checkpoint", teacher, "--augment.mixup", "0"]
    return [*options, "--distill.kwargs.stem_width", "8", "--distill.kwargs.channels", "[8, 16, 32, 64]"]


@pytest.mark.parametrize(
    "options",
    [
        ["--distill.temperature", "2"],
        ["--distill.hard"],
        ["--distill.features", "2"],
        ["--distill.feature_loss", "mse"],
    ],
)
def test_a_student_learns_what_a_teacher_says(tmp_path: Path, teacher: str, options: list[str]):
    options = ["--distill.alpha", "1", "--distill.features", "0.5", *options]
    run = trainer(tmp_path, *taught(teacher), *options, "--epochs", "3", "--schedule.warmup_epochs", "0")
    folder = run.fit()
    first, *_, last = [float(line.split(",")[1]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert last < 0.9 * first and run.best > 25  # of its labels it saw none
    assert load_file(folder / "checkpoints" / "best.safetensors").keys() == run.bare_model.state_dict().keys()


def test_a_distilled_run_resumes_with_its_projection(tmp_path: Path, teacher: str):
    options = [*taught(teacher), "--distill.features", "1", "--save_every", "4"]
    whole, part = trainer(tmp_path, *options), trainer(tmp_path, *options, "--name", "part")
    whole.fit()
    report = RunLog.report
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RunLog, "report", lambda *args: (report(*args), os.kill(os.getpid(), signal.SIGTERM)))
        part.fit()
    assert part.update == 2  # the update after the signal
    resumed = Trainer(*parse_train(["--resume", str(part.folder)]))
    resumed.fit()
    for ours, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("features", [0.0, 0.5])
@pytest.mark.parametrize("name, options", [("test_moh_vit", {}), ("test_overlock", {"use_ds": True})])
def test_what_a_paper_adds_to_the_loss_is_added_to_that_of_a_student(name: str, options: dict, features: float):
    model = visionattn.create_model(name, num_classes=10, **options).train()
    own, pairs = model.training_loss, []

    def training_loss(loss: Tensor, *args) -> Tensor:
        pairs.append((loss, own(loss, *args)))
        return pairs[0][1]

    model.training_loss = training_loss
    data = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    config = TrainConfig(data=data, distill=DistillConfig(model="test_van", features=features))
    teacher = visionattn.create_model("test_van", num_classes=10).eval()
    distillation = Distillation(config, teacher, 10, model, Accelerator(cpu=True))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def criterion(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    logits = (distillation.student or model)(images)
    loss = distillation.loss(criterion(logits), images, logits, criterion)
    assert len(pairs) == 1 and loss == pairs[0][1] > pairs[0][0]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unfit_teachers_are_refused(tmp_path: Path):
    torch.save(visionattn.create_model("test_van", num_classes=5).state_dict(), tmp_path / "five.pth")
    options = ["--distill.model", "test_van", "--distill.checkpoint", str(tmp_path / "five.pth")]
    with pytest.raises(VisionattnError, match="5 classes apart, the data has 10"):
        trainer(tmp_path, *options, "--distill.kwargs.num_classes", "5")
    with pytest.raises(VisionattnError, match="did you mean"):
        trainer(tmp_path, "--distill.model", "test_vam")


def first_losses(tmp_path: Path, *options: str) -> list[float]:
    updates = trainer(tmp_path, "--epochs", "1", *options).run_updates()
    return [next(updates) for _ in range(3)]


@pytest.mark.parametrize(
    "option", ["channels_last", "grad_checkpointing", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_how_a_model_is_executed_changes_no_result(tmp_path: Path, option: str):
    options = ["--model", "test_van", "--ema.decay", "0.9"]
    assert first_losses(tmp_path, *options, f"--{option}") == pytest.approx(first_losses(tmp_path, *options), rel=1e-4)


def test_a_window_of_updates_is_traced(tmp_path: Path):
    folder = train(*parse_train([*QUICK, "--output", str(tmp_path), "--profile", "3-4", "--epochs", "1"]))
    assert "aten::addmm" in (folder / "trace-3-4.json").read_text()
    with pytest.raises(VisionattnError, match="window of updates"):
        parse_train(["--profile", "9"])


@pytest.mark.parametrize("trackers", [(), ("wandb",), ("tensorboard",), ("all",)])
def test_runs_are_compared_where_they_were_sent(tmp_path: Path, trackers: tuple[str, ...], monkeypatch, capsys):
    made = SimpleNamespace(
        fit=lambda: tmp_path, accelerator=SimpleNamespace(is_main_process=True), told_best=lambda: "best"
    )
    monkeypatch.setattr(run, "Trainer", lambda *_: made)
    train(TrainConfig(trackers=trackers))
    assert ("tensorboard --logdir" in capsys.readouterr().out) == bool({"tensorboard", "all"} & set(trackers))


def test_a_dry_run_tells_and_leaves_nothing(tmp_path: Path, capsys):
    assert train(*parse_train([*QUICK, "--output", str(tmp_path / "runs"), "--dry-run"])) is None
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    model = visionattn.create_model("test_dinat", num_classes=10)
    assert told["parameters"].startswith(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M")
    assert float(told["GMACs"].split()[0]) > 0 and float(told["images/s"].split()[0]) > 0
    assert {"memory", "time"} <= told.keys() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["lamb", "sgd", "lion", "muon"])
def test_timms_optimizers_run_and_resume(tmp_path: Path, name: str):
    """A few updates, and the same ones again from a saved state."""
    options = ["--optim.name", name, "--optim.lr", "1e-3", "--augment.mixup", "0", "--epochs", "1", "--trackers", "[]"]
    whole = train(*parse_train([*QUICK, "--output", str(tmp_path), *options, "--data.val_fraction", "0.9"]))
    half = trainer(tmp_path, *options, "--data.val_fraction", "0.9")
    half._begin()
    next(half.run_updates())
    half._save_last()
    again = train(*parse_train(["--resume", str(half.folder)]))
    ours, theirs = (load_file(folder / "checkpoints" / "best.safetensors") for folder in (again, whole))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
