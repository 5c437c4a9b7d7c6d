"""The type of every recipe. A recipe is an instance; each field is a flag of `python -m cifar_jax.train RECIPE`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from cifar_jax.datasets import DATASETS
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS, get_model

if TYPE_CHECKING:
    ModelName: TypeAlias = str
    DatasetName: TypeAlias = str
else:  # the registries' names: what a flag may be
    ModelName = Literal[tuple(MODELS)]
    DatasetName = Literal[tuple(DATASETS)]
REGISTRIES: dict[str, Mapping[str, Any]] = {"model": MODELS, "dataset": DATASETS}
InputScaling = Literal["unit", "symmetric", "standardized"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A training recipe. Raises UserError for values that can't work."""

    workdir: str
    """The run's folder: config, metrics, checkpoints, figures. Starting again with it resumes."""
    model: ModelName
    """The network."""
    dropout_rates: tuple[float, ...]
    """Dropout, one number for each of the network's places, from the first to the last."""
    input_scaling: InputScaling
    """Pixels to [0, 1], to [-1, 1], or to zero mean and unit variance by channel (of the dataset's training set)."""
    batch_size: int
    """Images of one update, over all devices."""
    num_epochs: int
    """Passes over the training set."""
    learning_rate: float
    """Peak learning rate."""

    dataset: DatasetName = "cifar10"
    """The dataset. cifar100 has the fine labels; digits, of scikit-learn, are embedded."""
    data_dir: str | None = None
    """Where to look for the dataset first, and where to download it to."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    seed: int = 0
    """Of initialisation, order, augmentation and dropout."""

    holdout: int = 0
    """Training images that are held out and tested on in place of the test set: to choose settings by."""
    auto_restart: bool = False
    """Start again with half the rate and the next seed, up to three times, if training stalls or diverges."""

    initializer: Literal["original", "he", "lsuv", "identity"] = "original"
    """Kernels and biases as the original program draws them, or he_normal kernels and zero biases, or orthogonal ones
    scaled so that each layer's outputs for 256 training images have unit variance (LSUV, arXiv:1511.06422), or
    he_normal ones of which the first filters of each hidden convolution pass an input channel on (identity)."""
    normalization: Literal["none", "batch"] = "none"
    """batch: hidden outputs are normalised over each device's share of the batch while training, and the normalisation
    is folded into kernels and biases for evaluation (see normalization.py)."""
    normalization_scale: Literal["learnt", "fixed"] = "learnt"
    """fixed: the scales of the normalisation stay 1."""
    normalize_kernels: bool = False
    """Kernels of hidden layers are scaled to norm √outputs after each step. The normalisation undoes that in the
    outputs, so it fixes how large a step is relative to the kernel. muon's steps are then not scaled further."""
    whitening: bool = False
    """The first filters of the first layer whiten 256 training images' patches, and their negatives; they stay."""
    mirror_symmetry: bool = False
    """Weights that compute the same for an image and its mirror image: half of the units have the other half's kernels,
    mirrored (see symmetry.py). lenet5 then gains nothing by flips."""
    optimizer: Literal["sgd", "keras_sgd", "muon"] = "sgd"
    """SGD with momentum; keras_sgd keeps the learning rate inside the velocity, as Keras does; muon takes
    orthogonalised steps for kernels (arXiv:2502.16982's scale), Adam's (NAdam's with --nesterov) for the rest: biases
    and the last layer."""
    adam_learning_rate: float | None = None
    """Peak learning rate of muon's Adam part; None: learning_rate."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 0.0
    """L2 on all parameters, added to the gradient before the momentum (as torch.optim.SGD); decoupled in muon."""
    gradient_clip: float = 0.0
    """Largest norm of the whole gradient; 0: no limit."""
    sam_rho: float = 0.0
    """Sharpness-aware minimisation (arXiv:2010.01412): steps by the gradient at this distance up the slope, at twice
    the cost; 0: don't."""
    schedule: Literal["constant", "inverse_time", "cosine", "one_cycle"] = "constant"
    """Learning rate by step; inverse_time is learning_rate / (1 + lr_decay·step), one_cycle falls in a line to 0."""
    lr_decay: float = 0.0
    """Of the inverse_time schedule, per step."""
    warmup_fraction: float = 0.0
    """Share of the steps (but those of swa_fraction) in which the rate rises linearly from 0, before a cosine or
    one_cycle schedule falls."""
    ema_decay: float = 0.0
    """Of the exponential moving average of the parameters, which is then what is evaluated (but see swa_fraction); 0:
    none."""
    swa_fraction: float = 0.0
    """Stochastic weight averaging (arXiv:1803.05407): share of all steps, the last, that go into swa_cycles. The
    average so far (of ema_decay, else the parameters) and the parameters at the end of each cycle are averaged, and
    evaluated: in between the test accuracy stands still. 0: none."""
    swa_cycles: int = 4
    """Number of these cycles; no matter without swa_fraction."""
    swa_learning_rate: float = 0.005
    """Learning rate at the start of each; it falls in a line to 0. No matter without swa_fraction."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the classes."""

    rotation_degrees: float = 0.0
    """Random affine warp: rotation by ± this angle."""
    shift_fraction: float = 0.0
    """Random affine warp: shift by ± this fraction of height and width, sub-pixel."""
    crop_padding: int = 0
    """Random crop: shift by ± this number of whole pixels, edges reflected."""
    random_flip: bool = False
    """Mirror half of the images left and right."""
    alternating_flip: bool = False
    """Instead: every image in every second epoch, in the first epoch a random half of them (arXiv:2404.00498)."""
    cutout_size: int = 0
    """Side of the square that is set to 0, in pixels."""
    trivial_augment: bool = False
    """One operation at random (warps, colours, solarize, …) at a random strength, before all others, after
    arXiv:2103.10158."""
    mixup_alpha: float = 0.0
    """Mix each image with another of its batch, by a share from Beta(alpha, alpha) (arXiv:1710.09412); 0: don't."""
    cutmix_alpha: float = 0.0
    """The same, with a rectangle of that share (arXiv:1905.04899); 0: don't."""
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Progressive size: pairs of a side in pixels and a number of epochs; the other epochs have 32. Not for lenet5."""

    eval_batch_size: int = 500
    """Images of one evaluation step, over all devices."""
    num_devices: int | None = None
    """Local devices to use; None: all, but CPU cores only where each gets 16 images. Each draws its own dropout."""
    steps_per_call: int | None = None
    """Training steps of one compiled call; None: on a CPU the network's own number, elsewhere 1,000."""

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                flag = "--" + field.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, field)}: must be {rule}")

        check(self.workdir != "", "workdir", "a folder's name")
        for field, kind in get_type_hints(type(self)).items():
            value = getattr(self, field)
            if kind is bool:
                check(type(value) is bool, field, "true or false")
            elif kind in (int, int | None):
                check(type(value) is int or (value is None and kind is not int), field, "a whole number")
            elif field in REGISTRIES:
                check(value in REGISTRIES[field], field, f"one of {', '.join(REGISTRIES[field])}")
            elif get_origin(kind) is Literal:
                check(value in get_args(kind), field, f"one of {', '.join(get_args(kind))}")
        model = get_model(self.model)
        places = len(model().dropout_rates)
        for field in ("batch_size", "num_epochs", "eval_batch_size", "swa_cycles", "num_devices", "steps_per_call"):
            check(getattr(self, field) is None or getattr(self, field) >= 1, field, "1 or more")
        check(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295")
        check(len(self.dropout_rates) == places, "dropout_rates", f"{places} numbers for {self.model}")
        check(all(0 <= rate < 1 for rate in self.dropout_rates), "dropout_rates", "at least 0 and below 1")
        for field in ("learning_rate", "swa_learning_rate"):
            check(0 < getattr(self, field) < math.inf, field, "a number above 0")
        for field in ("momentum", "label_smoothing", "ema_decay", "swa_fraction", "warmup_fraction"):
            check(0 <= getattr(self, field) < 1, field, "at least 0 and below 1")
        adam_rate = self.adam_learning_rate
        check(adam_rate is None or 0 < adam_rate < math.inf, "adam_learning_rate", "a number above 0")
        check(adam_rate is None or self.optimizer == "muon", "adam_learning_rate", "unset unless --optimizer muon")
        normalized = self.normalization == "batch"
        check(normalized or not self.normalize_kernels, "normalize_kernels", "False unless --normalization batch")
        check(normalized or self.normalization_scale == "learnt", "normalization_scale", "learnt without normalization")
        check(not (self.whitening and self.mirror_symmetry), "whitening", "False with --mirror-symmetry")
        check(self.momentum > 0 or not self.nesterov, "momentum", "above 0 with --nesterov")
        check(0 <= self.crop_padding < 32, "crop_padding", "from 0 to 31")
        check(0 <= self.cutout_size <= 64, "cutout_size", "from 0 to 64")
        amounts = ("weight_decay", "lr_decay", "gradient_clip", "mixup_alpha", "cutmix_alpha", "holdout", "sam_rho")
        for field in (*amounts, "rotation_degrees", "shift_fraction"):
            check(0 <= getattr(self, field) < math.inf, field, "0 or more")
        for field in ("mixup_alpha", "cutmix_alpha"):
            check(getattr(self, field) == 0 or getattr(self, field) >= 0.001, field, "0, or 0.001 or more")
        check(self.mixup_alpha == 0 or self.cutmix_alpha == 0, "mixup_alpha", "0 with --cutmix-alpha")
        resizes = not self.image_sizes or model.RESIZABLE
        check(resizes, "image_sizes", f"empty for {self.model}, which takes 32×32 pixels alone")
        check(not (self.alternating_flip and self.random_flip), "alternating_flip", "False with --random-flip")
        sizes_fit = all(14 <= size <= 32 and epochs >= 1 for size, epochs in self.image_sizes)
        check(sizes_fit, "image_sizes", "pairs of a size from 14 to 32 and a number of epochs")
        check(self.lr_decay == 0 or self.schedule == "inverse_time", "lr_decay", "0 unless --schedule inverse_time")
        warms_up = self.schedule in ("cosine", "one_cycle")
        check(self.warmup_fraction == 0 or warms_up, "warmup_fraction", "0 unless --schedule cosine or one_cycle")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their batch."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def image_size(self, epoch: int) -> int:
        """The side of the training images in an epoch, counted from 0, in pixels."""
        for size, epochs in self.image_sizes:
            if epoch < epochs:
                return size
            epoch -= epochs
        return 32


# What a run may change when it is resumed: where things lie, how the work is cut, and whether a stalled run is
# restarted. How the work is cut changes nothing except rounding. The number of devices also changes the dropout masks,
# and which images are mixed.
EXECUTION_FIELDS = ("workdir", "data_dir", "auto_restart", "eval_batch_size", "num_devices", "steps_per_call")
