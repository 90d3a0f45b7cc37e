"""The methods that the benchmarks compare: names, factories, hyper-parameters and their sources.

A method is written as ``name[:key=value...][@factor]``: ``sam``, ``sam:rho=0.1``, ``sgd@2``. The
factor multiplies the epochs, so that ``sgd@2`` is SGD given the number of gradients that SAM uses.
A new method is a row of `METHODS`; an experiment with other defaults takes its rows by `select`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import samax
from samax._balance.groups import Groups

Table = Mapping[str, "Method"]
_MANY = 10_000  # steps over which ascents are counted


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its default settings."""

    # Builds the method from the hyper-parameters by name: a transformation that precedes the base
    # optimizer or, if it balances, one that wraps it.
    factory: Callable[..., optax.GradientTransformation]
    defaults: Mapping[str, float]  # The hyper-parameters used where the user names none
    source: str  # Where the defaults come from
    gradients: float = 2  # Gradient evaluations a step, at most
    # Whether it scales the cores of a tensorized model; its `alpha` then decays linearly to 0 over
    # the training.
    balances: bool = False
    # Whether it wraps the base optimizer and keeps the parameters to evaluate in its state.
    wraps: bool = False
    # The share of the batch that the first gradient is of; only `Trainer`s that are told so can.
    ascent_share: float = 1.0
    # Of the settings, the number of all steps and the seed, whether each step ascends; None where
    # every one does, or where that is not known beforehand.
    ascends: Callable[[Mapping[str, float], int, int], np.ndarray] | None = None
    # The span of each hyper-parameter that tuning searches.
    search: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def _sampled(factory: Callable[..., optax.GradientTransformation], distribution: Any) -> Callable:
    """The factory with the settings of `samax.Sampling` among its own, by name."""
    names = {field.name for field in dataclasses.fields(samax.Sampling)}

    def build(**settings: Any) -> optax.GradientTransformation:
        options = {name: settings.pop(name) for name in names & settings.keys()}
        return factory(sampling=samax.Sampling(distribution, **options), **settings)

    return build


def _occasional(policy: Callable[[int], samax.Policy], setting: str) -> Callable:
    """SAM on the steps of a policy, which is told one whole number, a setting by that name."""

    def build(**settings: Any) -> optax.GradientTransformation:
        chosen = policy(settings.pop(setting))
        return samax.occasionally(samax.sam(**settings), chosen)

    return build


def _against(rho: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(samax.scale_to_norm(rho), optax.scale(-1.0))


METHODS: dict[str, Method] = {
    "sgd": Method(optax.identity, {}, "the base optimizer alone", gradients=1),
    "sam": Method(samax.sam, {"rho": 0.05}, "arXiv 2010.01412, CIFAR-10"),
    "usam": Method(samax.usam, {"rho": 0.05}, "SAM's rho: the two agree where the norm is 1"),
    "asam": Method(samax.asam, {"rho": 0.5, "t0": 0.01}, "arXiv 2102.11600, CIFAR-10"),
    "vasso": Method(
        samax.vasso, {"rho": 0.05, "theta": 0.4}, "rho as SAM's; theta chosen here, 1 is SAM"
    ),
    "wsam": Method(samax.wsam, {"rho": 0.05, "gamma": 0.9}, "the authors' released defaults"),
    "gsam": Method(samax.gsam, {"rho": 0.05, "alpha": 0.2}, "the authors' CIFAR-10 example"),
    # Measured: with minibatches the smoothed ratio stays within about 3 % of 1, so that at samax's
    # own gamma of 0.1 lambda never leaves 1 and SAMAR is SAM.
    "samar": Method(samax.samar, {"rho": 0.05, "gamma": 0.01}, "SAM's rho; gamma measured here"),
    "friendly_sam": Method(
        samax.friendly_sam, {"rho": 0.05, "sigma": 1.0, "decay": 0.9}, "arXiv 2403.12350"
    ),
    "stable_sam": Method(samax.stable_sam, {"rho": 0.05}, "SAM's rho"),
    "looksam": Method(
        samax.looksam,
        {"rho": 0.05, "k": 5, "alpha": 0.3},
        "alpha measured on small data",
        1.2,
        ascends=lambda settings, steps, seed: np.arange(steps) % settings["k"] == 0,
    ),
    "sam_every": Method(
        _occasional(samax.every, "k"),
        {"rho": 0.05, "k": 2},
        "SAM's rho",
        ascends=lambda settings, steps, seed: np.arange(steps) % settings["k"] == 0,
    ),
    # Their `share` is that of the training's steps, after or until which they ascend.
    "sam_late": Method(
        _occasional(samax.from_step, "step"),
        {"rho": 0.05, "share": 0.5},
        "arXiv 2410.10373",
        ascends=lambda settings, steps, seed: np.arange(steps) >= round(settings["share"] * steps),
    ),
    "sam_early": Method(
        _occasional(samax.until_step, "step"),
        {"rho": 0.05, "share": 0.5},
        "arXiv 2410.10373",
        ascends=lambda settings, steps, seed: np.arange(steps) < round(settings["share"] * steps),
    ),
    # Where the host decides it draws with the seed, and a policy in the program with its own key.
    "sam_random": Method(
        _occasional(lambda p: samax.at_random(p, 0), "p"),
        {"rho": 0.05, "p": 0.5},
        "arXiv 2203.09962",
        ascends=lambda settings, steps, seed: (
            np.random.default_rng(seed).random(steps) < settings["p"]
        ),
    ),
    "stale_sam": Method(samax.stale_sam, {"rho": 0.05}, "SAM's rho", 1, wraps=True),
    "stale_sam_minus": Method(
        lambda optimizer, rho: samax.one_gradient(optimizer, _against(rho)),
        {"rho": 0.05},
        "stale SAM with the other sign",
        1,
        wraps=True,
    ),
    "msam": Method(samax.msam, {"rho": 0.3}, "arXiv 2401.12033: 0.3 to 3", 1, wraps=True),
    "msam_plus": Method(
        lambda optimizer, rho: samax.one_gradient(
            optimizer, samax.scale_to_norm(rho), source="momentum"
        ),
        {"rho": 0.3},
        "MSAM with the other sign",
        1,
        wraps=True,
    ),
    "trace_sam": Method(
        _sampled(samax.trace_sam, samax.gaussian),
        {"rho": 0.01, "lam": 1.0, "num_samples": 1},
        "the code of arXiv 2406.03682's authors: normal perturbations",
    ),
    "frob_sam": Method(
        _sampled(samax.frob_sam, samax.gaussian),
        {"rho": 0.005, "lam": 0.005, "num_samples": 2},
        "the code of arXiv 2406.03682's authors: half the unbiased variance",
    ),
    "det_sam": Method(
        _sampled(samax.det_sam, samax.cube(0.01)),
        {"rho": 1.0, "lam": 1.0, "num_samples": 1},
        "the code of arXiv 2406.03682's authors: a cube of half-width 0.01",
    ),
    "das": Method(samax.das, {"alpha": 0.1}, "arXiv 2508.10435, TR-ResNet-32 on CIFAR-10", 1, True),
    "nbar": Method(samax.nbar, {"alpha": 1.0}, "arXiv 2410.14802, LoRA: of 0.5, 1, 2", 1, True),
    "obar": Method(samax.obar, {"alpha": 1.0}, "arXiv 2410.14802, LoRA: of 0.5, 1, 2", 1, True),
}
BALANCING = tuple(name for name, method in METHODS.items() if method.balances)


def select(name: str, defaults: Mapping[str, float], source: str, **changes: Any) -> Method:
    """Returns a row of the table with other defaults, and whatever else an experiment changes."""
    return dataclasses.replace(METHODS[name], defaults=defaults, source=source, **changes)


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """One row of a comparison: a method, its hyper-parameters and a multiple of the epochs."""

    label: str
    name: str
    method: Method
    hyperparameters: dict[str, float]
    epoch_factor: int = 1

    @property
    def gradients(self) -> float:
        """Gradient evaluations of a whole batch a step, the mean over a training."""
        samples = self.hyperparameters.get("num_samples")
        if samples is not None:
            return samples + 1
        if self.method.ascends is None:
            return self.method.gradients
        ascents = self.method.ascends(self.hyperparameters, _MANY, 0).mean()
        return 1 + float(ascents) * self.method.ascent_share

    def optimizer(
        self,
        base: optax.GradientTransformation,
        *,
        learning_rate: optax.ScalarOrSchedule = 0.0,
        steps: int = 1,
        groups: Groups | None = None,
        track: bool = True,
        alpha_scale: float = 1.0,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the method with its base optimizer.

        Args:
            base: The base optimizer, learning rate and weight decay included.
            learning_rate: The base optimizer's, as a number or a schedule.
            steps: The steps of the whole training.
            groups: The model's cores; None if it has none.
            track: Whether the state keeps the scalars of sharpness-aware methods.
            alpha_scale: Multiplies the `alpha` of balancing methods.

        Raises:
            ValueError: A hyper-parameter has an unknown name or an invalid value, or a method that
                balances cores finds none.
        """
        settings: dict[str, Any] = dict(self.hyperparameters)
        try:
            if self.method.balances:
                if groups is None:
                    raise ValueError(
                        "it balances the cores of tensorized layers, and the model has none; "
                        "choose a tensorized model, such as --model tr-resnet20"
                    )
                start = alpha_scale * settings.pop("alpha")
                # samax looks at a schedule in `init`, which is late; what is told later is traced.
                if not isinstance(start, jax.core.Tracer) and not start >= 0:
                    raise ValueError(f"alpha must be at least 0, got {start}")
                alpha = optax.linear_schedule(start, 0.0, steps)
                wrap = {"learning_rate": learning_rate, "alpha": alpha, "groups": groups}
                return self.method.factory(base, **wrap, **settings)
            if self.method.wraps:
                return self.method.factory(base, **settings)
            if "share" in settings:
                settings["step"] = round(settings.pop("share") * steps)
            if track and self.method.gradients > 1:
                settings["track"] = True
            method = self.method.factory(**settings)
            return optax.with_extra_args_support(optax.chain(method, base))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Method {self.label!r} cannot be built: {error}") from error


def parse_method(text: str, table: Table = METHODS) -> MethodSpec:
    """Reads one method in the notation ``name[:key=value...][@factor]``.

    Args:
        text: For example ``"sam"``, ``"vasso:rho=0.1:theta=0.2"`` or ``"sgd@2"``; whole numbers
            stay so.
        table: The methods to choose from.

    Returns:
        The method, whose label is ``text`` without spaces.

    Raises:
        ValueError: The name is unknown, or a setting or the factor cannot be read.
    """
    label = "".join(text.split())
    body, _, factor = label.partition("@")
    name, *settings = body.split(":")
    if name not in table:
        raise ValueError(f"Unknown method {name!r}; the methods are {', '.join(table)}.")
    if factor and (not factor.isdigit() or int(factor) < 1):
        raise ValueError(f"Method {label!r}: '@{factor}' must be '@' and a whole number above 0.")
    hyperparameters = dict(table[name].defaults)
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            hyperparameters[key] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ValueError(
                f"Method {label!r}: {setting!r} must be key=number, as in sam:rho=0.1."
            ) from None
    return MethodSpec(label, name, table[name], hyperparameters, int(factor or 1))


def parse_methods(texts: Iterable[str], table: Table = METHODS) -> list[MethodSpec]:
    """Reads methods, in the order given.

    Raises:
        ValueError: As `parse_method`; also for an empty list or a method named twice.
    """
    specs = [parse_method(text, table) for text in texts]
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise ValueError(
            f"--methods {','.join(labels)!r} must name at least one method, and none twice."
        )
    return specs
