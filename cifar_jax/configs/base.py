"""The type of every recipe. A recipe is an instance; each field is a flag of `python -m cifar_jax.train RECIPE`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_type_hints

from cifar_jax.annotations import broken_rule, is_number
from cifar_jax.batches import InputScaling
from cifar_jax.datasets import DATASETS
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS, get_model

if TYPE_CHECKING:
    ModelName: TypeAlias = str
    DatasetName: TypeAlias = str
else:  # the names that a flag accepts
    ModelName = Literal[tuple(MODELS)]
    DatasetName = Literal[tuple(DATASETS)]
REGISTRIES: dict[str, Mapping[str, Any]] = {"model": MODELS, "dataset": DATASETS}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training recipe. Raises: UserError for invalid values."""

    workdir: str
    """Folder of the run: config, metrics, checkpoints, figures. The same folder resumes the run."""
    model: ModelName
    """Network."""
    dropout_rates: tuple[float, ...]
    """Dropout rates, one for each dropout layer of the network, from the first to the last."""
    input_scaling: InputScaling
    """Scaling of pixels: to [0, 1], to [-1, 1], or to zero mean and unit variance per channel (training set)."""
    batch_size: int
    """Images per update, over all devices."""
    num_epochs: int
    """Number of passes over the training set."""
    learning_rate: float
    """Peak learning rate."""

    dataset: DatasetName = "cifar10"
    """Dataset. cifar100 has the fine labels; digits are scikit-learn's embedded handwritten digits."""
    data_dir: str | None = None
    """Folder of the dataset, or an empty folder to download it to; None: the standard places (docs/data.md)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation type. Parameters stay float32."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""

    holdout: int = 0
    """Number of training images to hold out and test on instead of the test set, for choosing settings."""
    auto_restart: bool = False
    """If training stalls or diverges, start again with half the rate and the next seed, up to three times."""

    initializer: Literal["original", "he", "lsuv", "identity"] = "original"
    """Initial kernels. original: as in the original program; he: he_normal; lsuv: orthogonal, scaled so that each
    layer's outputs for 256 training images have unit variance (arXiv:1511.06422); identity: he_normal, except that the
    first filters of each convolution copy an input channel. All except original have zero biases."""
    normalization: Literal["none", "batch"] = "none"
    """batch: normalise hidden outputs over each device's part of the batch during training. The normalisation is
    folded into kernels and biases for evaluation (see normalization.py)."""
    normalization_scale: Literal["learnt", "fixed"] = "learnt"
    """fixed: the scales of the normalisation stay 1."""
    normalize_kernels: bool = False
    """Rescale the kernels of hidden layers to norm √outputs after each step, so that the size of a step relative to its
    kernel is fixed. The normalisation cancels the rescaling in the outputs. muon's steps are
    then not scaled to Adam's."""
    whitening: bool = False
    """The first layer's first filters whiten the patches of 256 training images. These filters are not trained."""
    mirror_symmetry: bool = False
    """Give an image and its mirror image the same logits (all_cnn: nearly the same): half of the units have the other
    half's kernels, mirrored (see symmetry.py). Flips then have no effect on lenet5."""
    optimizer: Literal["sgd", "keras_sgd", "muon"] = "sgd"
    """sgd: SGD with momentum; keras_sgd: the same with the learning rate inside the velocity, as in Keras; muon:
    orthogonalised steps for kernels (scaled as in arXiv:2502.16982), and Adam (NAdam with --nesterov) for biases and
    the last layer."""
    adam_learning_rate: float | None = None
    """Peak learning rate of muon's Adam part; None: learning_rate."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 on all parameters, added to the gradient before the momentum (as in torch.optim.SGD); decoupled in muon."""
    gradient_clip: float = 0.0
    """Largest norm of the whole gradient; 0: no limit."""
    sam_rho: float = 0.0
    """Radius of sharpness-aware minimisation (arXiv:2010.01412), which doubles the cost of a step; 0: off."""
    schedule: Literal["constant", "inverse_time", "cosine", "one_cycle"] = "constant"
    """Learning-rate schedule. inverse_time: learning_rate / (1 + lr_decay·step); one_cycle: falls linearly to 0."""
    lr_decay: float = 0.0
    """Decay of the inverse_time schedule per step."""
    warmup_fraction: float = 0.0
    """Share of the steps before the swa_cycles in which the rate rises linearly from 0. Needs cosine or one_cycle."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the parameters, which is then evaluated; 0: no average."""
    swa_fraction: float = 0.0
    """Share of all steps, at the end, for the cycles of stochastic weight averaging (arXiv:1803.05407); 0: no cycles.
    The average before the cycles (the parameters without ema_decay) and the parameters at the end of each cycle are
    averaged and evaluated. The test accuracy does not change within a cycle."""
    swa_cycles: int = 4
    """Number of cycles. Needs swa_fraction."""
    swa_learning_rate: float = 0.005
    """Learning rate at the start of each cycle, from which it falls linearly to 0. Needs swa_fraction."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes."""

    teacher: str | None = None
    """Also learn the logits of a trained network (arXiv:1503.02531): a released one's name, a run's folder or a weight
    file. Its logits of all flips and crops of the training images are computed once and cached."""
    teacher_share: float = 0.9
    """Share of the teacher in the loss. The labels have the rest."""
    teacher_temperature: float = 4.0
    """Temperature of the probabilities that are compared with the teacher's."""

    rotation_degrees: float = 0.0
    """Random affine warp: largest rotation in degrees."""
    shift_fraction: float = 0.0
    """Random affine warp: largest shift as a fraction of height and width (sub-pixel)."""
    crop_padding: int = 0
    """Random crop: largest shift in whole pixels, with reflected edges."""
    random_flip: bool = False
    """Mirror each image horizontally with probability 0.5."""
    alternating_flip: bool = False
    """Mirror a random half of the images in even epochs and the other half in odd epochs (arXiv:2404.00498)."""
    cutout_size: int = 0
    """Side in pixels of a random square that is set to 0 (arXiv:1708.04552); 0: off."""
    trivial_augment: bool = False
    """Before all other augmentation, apply one random operation (warp, colour, solarize, …) at a random strength
    (arXiv:2103.10158)."""
    mixup_alpha: float = 0.0
    """Mix each image with another of its batch, with weights from Beta(alpha, alpha) (arXiv:1710.09412); 0: off."""
    cutmix_alpha: float = 0.0
    """Replace a rectangle of each image by another image of its batch. Beta(alpha, alpha) gives the area that stays
    (arXiv:1905.04899); 0: off."""
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Sides in pixels of the images in the first epochs: pairs of a side and a number of epochs. Not for lenet5."""

    eval_batch_size: int = 500
    """Images per evaluation step, over all devices."""
    num_devices: int | None = None
    """Number of devices of all processes; None: all, but no more CPU cores than can get 16 images each."""
    steps_per_call: int | None = None
    """Training steps per compiled call; None: on a CPU the network's own number, elsewhere up to 1000."""
    deterministic: bool = False
    """On a GPU, use only operations for training and test that give the same bits each time, at the cost of speed."""
    logger: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send each epoch's metrics to TensorBoard (into WORKDIR/tensorboard) or Weights & Biases."""
    profile: int = 0
    """Number of steps to record in a trace for Perfetto or xprof (into WORKDIR/profile); 0: none."""

    def _convert(self) -> None:
        """Makes tuples of lists, which JSON has in their place and which are not hashable, and text of paths."""
        for field in ("workdir", "data_dir", "teacher"):
            if isinstance(value := getattr(self, field), os.PathLike):
                object.__setattr__(self, field, os.fspath(value))
        try:
            object.__setattr__(self, "dropout_rates", tuple(self.dropout_rates))
            object.__setattr__(self, "image_sizes", tuple(map(tuple, self.image_sizes)))
        except TypeError as error:
            raise UserError(f"dropout_rates and image_sizes must be sequences ({error})") from error

    def _check(self, ok: bool, field: str, rule: str) -> None:
        if not ok:
            flag = "--" + field.replace("_", "-")
            raise UserError(f"{flag} {getattr(self, field)}: must be {rule}")

    def _check_types(self) -> None:
        for field, annotation in get_type_hints(type(self)).items():
            rule = broken_rule(annotation, getattr(self, field), REGISTRIES.get(field))
            self._check(rule is None, field, str(rule))
        self._check(all(map(is_number, self.dropout_rates)), "dropout_rates", "numbers")
        pairs = all(len(pair) == 2 and {*map(type, pair)} == {int} for pair in self.image_sizes)
        self._check(pairs, "image_sizes", "pairs of whole numbers")

    def __post_init__(self) -> None:
        check = self._check
        self._convert()
        self._check_types()
        check(self.workdir != "", "workdir", "a folder's name")
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
        check(not (self.whitening and self.initializer == "lsuv"), "whitening", "False with --initializer lsuv")
        check(self.momentum > 0 or not self.nesterov, "momentum", "above 0 with --nesterov")
        check(0 <= self.crop_padding < 32, "crop_padding", "from 0 to 31")
        check(0 <= self.cutout_size <= 64, "cutout_size", "from 0 to 64")
        amounts = ("weight_decay", "lr_decay", "gradient_clip", "mixup_alpha", "cutmix_alpha", "holdout", "sam_rho")
        for field in (*amounts, "profile", "rotation_degrees", "shift_fraction"):
            check(0 <= getattr(self, field) < math.inf, field, "0 or more")
        for field in ("mixup_alpha", "cutmix_alpha"):
            check(getattr(self, field) == 0 or getattr(self, field) >= 0.001, field, "0, or 0.001 or more")
        check(self.mixup_alpha == 0 or self.cutmix_alpha == 0, "mixup_alpha", "0 with --cutmix-alpha")
        resizes = not self.image_sizes or model.RESIZABLE
        check(resizes, "image_sizes", f"empty for {self.model}, which takes only 32×32 pixels")
        check(0 < self.teacher_share <= 1, "teacher_share", "above 0 and at most 1")
        check(0.1 <= self.teacher_temperature <= 100, "teacher_temperature", "from 0.1 to 100")
        check(self.teacher != "", "teacher", "a released network's name, a run's folder or a weight file")
        taught = self.teacher is not None
        for field in ("rotation_degrees", "shift_fraction", "mixup_alpha", "cutmix_alpha", "trivial_augment"):
            check(not (taught and getattr(self, field)), field, "off with --teacher, which sees only flips and crops")
        check(not (self.alternating_flip and self.random_flip), "alternating_flip", "False with --random-flip")
        sizes_fit = all(14 <= size <= 32 and epochs >= 1 for size, epochs in self.image_sizes)
        check(sizes_fit, "image_sizes", "pairs of a size from 14 to 32 and a number of epochs")
        check(self.lr_decay == 0 or self.schedule == "inverse_time", "lr_decay", "0 unless --schedule inverse_time")
        warms_up = self.schedule in ("cosine", "one_cycle")
        check(self.warmup_fraction == 0 or warms_up, "warmup_fraction", "0 unless --schedule cosine or one_cycle")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with other images of their batch."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def image_size(self, epoch: int) -> int:
        """Returns the side of the training images in pixels, in an epoch counted from 0."""
        for size, epochs in self.image_sizes:
            if epoch < epochs:
                return size
            epoch -= epochs
        return 32


# Fields that may change when a run is resumed: places of files, division of the work, watching, and restarts of stalled
# runs. The division of the work changes rounding. The number of devices also changes what `normalization` normalises.
EXECUTION_FIELDS = (
    *("workdir", "data_dir", "auto_restart", "logger", "profile"),
    *("eval_batch_size", "num_devices", "steps_per_call", "deterministic"),
)
