"""Runs: a recipe with the model, the data and the numbers that it is trained with.

Every recipe has runs on the embedded data, which take minutes; some have the papers' own, on files that the user has.
A paper's run has the paper's numbers; what we do not know of it, or had to choose, is told in :attr:`Run.ours`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fqtstats.errors import InputError
from fqtstats.training.optimizers import Optimizer
from fqtstats.training.recipes import RECIPES, Recipe, get

__all__ = ["OPTIONS", "RUNS", "SETTINGS", "Run", "Setting", "run"]

OPTIONS = ("model", "data", "epochs", "batch_size", "augment", "image_size")
"""What a run says beside its recipe."""


@dataclass(frozen=True)
class Run:
    """What one training takes.

    Attributes:
        name: the recipe's and the setting's, ``"recipe/setting"``.
        recipe: with the setting's numbers.
        model, data: names in :data:`fqtstats.models.MODELS` and :data:`fqtstats.data.SOURCES`.
        epochs: passes over the training data.
        batch_size: samples per step.
        augment: whether training images are changed at random.
        image_size: pixels, for images from a folder.
        published: whether it is a paper's.
        ours: of a paper's run, what is not the paper's.
    """

    name: str
    recipe: Recipe
    model: str
    data: str
    epochs: int
    batch_size: int
    augment: bool = False
    image_size: int | None = None
    published: bool = False
    ours: str = ""


@dataclass(frozen=True)
class Setting:
    """What the runs of several recipes have in common.

    Attributes:
        name: of the setting.
        recipes: that have it.
        adapt: from a recipe as :func:`fqtstats.training.recipes.get` gives it to the run's.
        others: as of :class:`Run`.
    """

    name: str
    recipes: tuple[str, ...]
    model: str
    data: str
    epochs: int
    batch_size: int
    adapt: Callable[[Recipe], Recipe] = lambda recipe: recipe
    augment: bool = False
    image_size: int | None = None
    published: bool = False
    ours: str = ""


_TEXT_LR = {"sgd": 0.1, "adam": 3e-3}
# Two students move the teacher: it learns with both at a lower rate than with one.
_TEXT_LR_OF = {"joint-2-4": 0.02}


def _for_text(recipe: Recipe) -> Recipe:
    lr = _TEXT_LR_OF.get(recipe.name, _TEXT_LR[recipe.optimizer.name])
    return replace(recipe, optimizer=replace(recipe.optimizer, lr=lr))


def _statquant_cifar(recipe: Recipe) -> Recipe:
    # arXiv 2010.14298, section 5.
    return replace(recipe, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, weight_decay=1e-4))


def _statquant_imagenet(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        optimizer=Optimizer("sgd", lr=0.4, momentum=0.875, weight_decay=3.05e-5),
        warmup=4 / 90,
        label_smoothing=0.1,
        decay_norms=False,
    )


def _one_bit(recipe: Recipe) -> Recipe:
    # arXiv 2408.14267: fine-tuning of a network that was trained in full precision.
    return replace(
        recipe,
        stages=(replace(recipe.stages[-1], share=1.0, lr_scale=1.0),),
        optimizer=Optimizer("adam", lr=1e-5, linear_lr=1e-3, weight_decay=1e-5),
        starts_from="full-precision",
    )


def _joint_cifar(recipe: Recipe) -> Recipe:
    # arXiv 1908.04680; the weights of the losses are those of Distillation.
    return replace(recipe, optimizer=replace(recipe.optimizer, lr=0.1))


_STATQUANT = ("exact", "statquant-qat", "statquant-ptq", "statquant-psq", "statquant-bhq")

SETTINGS: tuple[Setting, ...] = (
    Setting("digits", tuple(RECIPES), "preact_resnet20", "digits", epochs=10, batch_size=64),
    Setting("text", tuple(RECIPES), "transformer", "text", epochs=5, batch_size=128, adapt=_for_text),
    Setting(
        "cifar10",
        _STATQUANT,
        "preact_resnet56",
        "cifar10",
        epochs=200,
        batch_size=128,
        adapt=_statquant_cifar,
        augment=True,
        published=True,
        ours="the augmentation",
    ),
    *(
        Setting(
            f"imagenet-{model}",
            _STATQUANT,
            model,
            "images",
            epochs=90,
            batch_size=400,
            adapt=_statquant_imagenet,
            augment=True,
            image_size=224,
            published=True,
            ours="the augmentation; one process, where the paper has 8 with batches of 50",
        )
        for model in ("resnet18", "resnet50")
    ),
    *(
        Setting(
            f"{data}-{model}",
            ("1bit-qat-adam", "1bit-psq-adam", "1bit-agp-adam"),
            model,
            data,
            epochs=60,
            batch_size=128,
            adapt=_one_bit,
            augment=True,
            published=True,
            ours="the schedule, the augmentation, the choice of the data, 1-bit activations behind a ReLU",
        )
        for data in ("cifar10", "cifar100")
        for model in ("resnet18", "vgg16")
    ),
    Setting(
        "cifar100",
        ("joint-2-4",),
        "preact_resnet20",
        "cifar100",
        epochs=200,
        batch_size=128,
        adapt=_joint_cifar,
        augment=True,
        published=True,
        ours="the batch size, momentum, weight decay, schedule, augmentation and first and last layer",
    ),
)

RUNS: dict[str, tuple[str, Setting]] = {
    f"{recipe}/{setting.name}": (recipe, setting) for setting in SETTINGS for recipe in setting.recipes
}
"""Recipe and setting by the name of the run."""


def run(name: str, bits: int | None = None) -> Run:
    """A run by name.

    Args:
        name: one of :data:`RUNS`, ``"recipe/setting"``.
        bits: of the recipe; None: its default.

    Raises:
        InputError: there is no such run (lists those of the recipe), or the recipe is not defined for these bits.
    """
    if name not in RUNS:
        recipe = name.partition("/")[0]
        if recipe not in RECIPES:
            raise InputError(f"expected a run as recipe/setting, got {name!r}; known recipes: {', '.join(RECIPES)}")
        own = [f"{recipe}/{setting.name}" for setting in SETTINGS if recipe in setting.recipes]
        raise InputError(f"recipe {recipe!r} has no run {name!r}; known: {', '.join(own)}")
    recipe, setting = RUNS[name]
    return Run(
        name=name,
        recipe=setting.adapt(get(recipe, bits)),
        model=setting.model,
        data=setting.data,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        augment=setting.augment,
        image_size=setting.image_size,
        published=setting.published,
        ours=setting.ours,
    )
