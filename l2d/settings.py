"""Settings that are declared once: everything that checks, sets, lists or shows them reads the field's metadata.

- `setting`: a dataclass field with its help, its kind, and notes; `declared`: the settings of a class, as `Setting`
- `whole`, `number`, `truth`, `one_of`, `Kind`: what values are allowed, in words and as a check
- `check_settings`: checks and converts all settings of an object

No torch is imported.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

Check = Callable[[str, Any], Any]
_HELD = "setting"  # key of a field's metadata


@dataclasses.dataclass(frozen=True)
class Kind:
    """The values that a setting may have.

    allowed: in words, which follow "must be"; check: name and value -> the value as it is kept, or a one-sentence
    `ValueError`; choices: the words to choose from, where there are some.
    """

    allowed: str
    check: Check
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as it is declared.

    Attributes:
        default, kind, help: its default, the values it may have, and its meaning in one line.
        name: of the field.
        argument: name under which users know it, where that is not the field's.
        default_words: the default in words, where the value does not say it.
        changes_answers: whether an answer may depend on it; others only change speed or memory.
        compute: whether it says which evaluations are computed: a control with a trajectory of its own sets it anew.
        adaptive: whether only adaptive solvers follow it.
        of_the_weights: whether trained weights fit no other value: a run cannot resume with another one.
        shown: phrase for an unusual value in a description, with `{}` for the value; empty where it is told otherwise.
    """

    default: Any
    kind: Kind
    help: str
    name: str = ""
    argument: str = ""
    default_words: str = ""
    changes_answers: bool = True
    compute: bool = False
    adaptive: bool = False
    of_the_weights: bool = False
    shown: str | None = None

    def check(self, value: Any) -> Any:
        """`value` as it is kept; `ValueError` names it as users do."""
        return self.kind.check(self.argument, value)

    def phrase(self, value: Any) -> str:
        """An unusual value in a description."""
        return (f"{self.argument.replace('_', ' ')} {{}}" if self.shown is None else self.shown).format(value)


def setting(default: Any, kind: Kind, help: str, **notes: Any) -> Any:
    """A dataclass field that declares a setting; `notes` are further attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={_HELD: Setting(default, kind, help, **notes), "help": help})


def declared(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by the names of their fields, in their order."""
    return _declared(cls)


@functools.cache
def _declared(cls: Any) -> dict[str, Setting]:
    held = {field.name: field.metadata[_HELD] for field in dataclasses.fields(cls) if _HELD in field.metadata}
    return {n: dataclasses.replace(one, name=n, argument=one.argument or n) for n, one in held.items()}


def check_settings(values: Any) -> None:
    """Check every setting of a dataclass object and keep the converted value. Raises `ValueError`."""
    for name, one in declared(type(values)).items():
        object.__setattr__(values, name, one.check(getattr(values, name)))


# ---- kinds -------------------------------------------------------------------------------------------------------


def refused(name: str, value: Any, allowed: str) -> ValueError:
    """The sentence about a wrong value; a whole number is written without a fraction."""
    shown = str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
    return ValueError(f"{name}={shown} must be {allowed}.")


def optional(kind: Kind) -> Kind:
    """`kind`, or nothing."""
    return Kind(kind.allowed, lambda name, value: None if value is None else kind.check(name, value), kind.choices)


def whole(low: int, high: int | None = None, high_words: str = "") -> Kind:
    """Whole numbers from `low` to `high` (in words, `high_words`); text and floats that hold one are converted."""
    most = high_words or str(high)
    allowed = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {most}"

    def check(name: str, value: Any) -> int:
        try:
            number = int(value)
            fits = not isinstance(value, bool) and number == float(value) and low <= number
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits or (high is not None and number > high):
            raise refused(name, value, allowed)
        return number

    return Kind(allowed, check)


def number(allowed: str = "a finite number", fits: Callable[[float], bool] = math.isfinite) -> Kind:
    """Finite numbers that `fits` accepts; text that holds one is converted."""

    def check(name: str, value: Any) -> float:
        try:
            converted = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            converted = math.nan
        if not math.isfinite(converted) or not fits(converted):
            raise refused(name, value, allowed)
        return converted

    return Kind(allowed, check)


def one_of(*choices: str) -> Kind:
    """One of some words."""

    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not known; choose one of: {', '.join(choices)}.")
        return value

    return Kind(", ".join(choices), check, choices)


def matching(allowed: str, fits: Callable[[Any], bool]) -> Kind:
    """Values that `fits` accepts, unchanged."""

    def check(name: str, value: Any) -> Any:
        if not fits(value):
            raise refused(name, value, allowed)
        return value

    return Kind(allowed, check)


def _check_truth(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise refused(name, value, "true or false")
    return value


positive = number("a number above 0", lambda value: value > 0)
truth = Kind("true or false", _check_truth, ("true", "false"))
text = matching("a text", lambda value: isinstance(value, str) and bool(value))
