"""What benchmarks/reproduce.py trains, at two scales: each method's baseline and recipe."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowssl_core.checkpoint import load_checkpoint
from lowssl_core.errors import UserError
from lowssl_core.journal import read_metrics
from lowssl_core.recipe import differences, load_recipe
from lowssl_core.run import CHECKPOINT

ARMS = ("baseline", "recipe", "equal-compute")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A method with a backbone: a baseline, the recipe, and the recipe in as many epochs as the baseline's time pays.

    Attributes:
        method: "dino", "moco" or "swav".
        backbone: a name of `BACKBONES`.
        recipe: one of LowSSL's recipes; as it is, it is the recipe's arm.
        shared: changes to it in all arms.
        baseline: further changes in the baseline.
        epochs: of baseline and recipe.
        seeds: how many; one seed has the same weights and the same order of images in all arms.
    """

    method: str
    backbone: str
    recipe: str
    shared: Sequence[str]
    baseline: Sequence[str]
    epochs: int
    seeds: int

    @property
    def name(self) -> str:
        """What tells it from other contests."""
        return f"{self.method}-{self.backbone}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """One arm of a contest with one seed."""

    contest: Contest
    arm: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / f"{self.contest.name}-{self.arm}-seed{self.seed}"

    def changes(self, epochs: int) -> list[str]:
        """What is changed in the contest's recipe, as `--set` takes it."""
        contest = self.contest
        own = contest.baseline if self.arm == "baseline" else ()
        return [f"backbone.name={contest.backbone}", f"epochs={epochs}", f"seed={self.seed}", *contest.shared, *own]

    def epochs(self, out: Path) -> int:
        """As planned; at equal compute as many whole ones as cost at most the baseline's time."""
        if self.arm != "equal-compute":
            return self.contest.epochs
        return max(1, int(self.contest.epochs / step_ratio(self.contest, out)))

    def is_finished(self, out: Path) -> bool:
        """Whether it is done.

        Raises:
            UserError: its folder holds a run of another recipe.
        """
        path = self.folder(out) / CHECKPOINT
        # Without the first seed's pair it is not known how many epochs are equal compute.
        first = [Training(contest=self.contest, arm=arm, seed=0) for arm in ("baseline", "recipe")]
        needed = [path, *((each.folder(out) / CHECKPOINT) for each in first if self.arm == "equal-compute")]
        if not all(each.exists() for each in needed):
            return False
        checkpoint = load_checkpoint(path)
        recipe = load_recipe(self.contest.recipe, self.changes(self.epochs(out)))
        if changed := differences(checkpoint.recipe, recipe):
            raise UserError(f"--out: {path.parent} holds another run (there, here): {'; '.join(changed)}")
        return checkpoint.progress.is_done


def step_ratio(contest: Contest, out: Path) -> float:
    """Time of the recipe's step over that of the baseline's: medians over the two runs of the first seed."""
    seconds = []
    for arm in ("recipe", "baseline"):
        rows = read_metrics(Training(contest=contest, arm=arm, seed=0).folder(out), "train")
        seconds.append(statistics.median(row["seconds_per_step"] for row in rows))
    return seconds[0] / seconds[1]


def trainings(contests: Sequence[Contest]) -> Iterator[tuple[Training, ...]]:
    """The arms of each contest and seed together; every contest's first seed comes before any second one."""
    for seed in range(max(contest.seeds for contest in contests)):
        for contest in contests:
            if seed < contest.seeds:
                yield tuple(Training(contest=contest, arm=arm, seed=seed) for arm in ARMS)


def _baseline(smallest: float, local_size: int) -> tuple[str, ...]:
    """Crop scales, local size and alpha are all that a baseline differs in (Tan et al. 2023, section 5)."""
    return (
        f"views.global_scale=[{smallest}, 1.0]",
        f"views.local_scale=[0.05, {smallest}]",
        f"views.local_size={local_size}",
        "alpha=",  # the default formulation
    )


# The paper's baseline has local views of 96 px beside globals of 224: 14 beside 32.
_CNN_BASELINE = _baseline(0.14, 14)
_EVERY_EPOCH = ("monitor.quality_every_epochs=1", "monitor.checkpoint_every_epochs=1")


def _small(method: str, backbone: str = "mobilenetv2_tiny", seeds: int = 1) -> Contest:
    return Contest(
        method=method,
        backbone=backbone,
        recipe=f"tiny-{method}-matched",
        shared=_EVERY_EPOCH,
        baseline=_CNN_BASELINE,
        epochs=5,
        seeds=seeds,
    )


def _cifar(method: str, backbone: str = "mobilenetv2", seeds: int = 1) -> Contest:
    return Contest(
        method=method,
        backbone=backbone,
        recipe=f"small-{method}-matched",
        shared=("views.global_size=32",),
        baseline=_CNN_BASELINE,
        epochs=200,
        seeds=seeds,
    )


# ViT-Ti cuts patches of 16 px and takes multiples of them alone. Of 32 px it would see four patches, and one of a local
# view: so images are enlarged to 128 px, where a patch shows 4 x 4 of their pixels. Local views are rounded to patches:
# 48 px in the baseline (96 / 224 of 128 is 55), 80 matched (73). Head, crop scales and drop path are the paper's.
_CIFAR_VIT = Contest(
    method="dino",
    backbone="vit_tiny",
    recipe="small-dino-matched",
    shared=(
        "views.global_size=128",
        "backbone.drop_path=0.1",
        "method.head_batchnorm=false",
        "method.gain_trainable=true",
    ),
    baseline=_baseline(0.25, 48),
    epochs=200,
    seeds=1,
)

# By scale and part. On a CPU no published backbone learns in minutes: two tiny networks stand for them, and no ViT.
CONTESTS: Mapping[str, Mapping[str, Sequence[Contest]]] = {
    "small": {
        "methods": [_small("dino", seeds=3), _small("moco"), _small("swav")],
        "backbones": [_small("dino"), _small("dino", "resnet_tiny")],
        "semi": [_small("dino", seeds=3)],
    },
    "cifar": {
        "methods": [_cifar(method, seeds=3) for method in ("dino", "moco", "swav")],
        "backbones": [*(_cifar("dino", name) for name in ("mobilenetv2", "resnet18", "resnet34")), _CIFAR_VIT],
        "semi": [_cifar("dino", name) for name in ("mobilenetv2", "resnet18", "resnet34")],
    },
}
