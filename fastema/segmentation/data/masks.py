"""Tell what the values of a set's masks mean: which are foreground, which background, which are to be ignored.

A mask file holds numbers (grey levels, classes, instances), palette indices, colours, transparency, or probabilities.
`decode` finds out which, file by file; `decide` makes one rule for all files of a kind from the values of all of them,
or raises `MaskValuesError` where they could mean several things.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from fastema.core.checks import first_few
from fastema.segmentation.asked import NOTHING_ASKED, Asked

Form = Literal["numbers", "palette", "colours", "alpha", "probabilities"]

#: A pixel that counts neither as foreground nor as background.
IGNORED = -1

_BLACK, _WHITE = 0x000000, 0xFFFFFF
_VOC_VOID = 0xE0E0C0  # the colour of PASCAL VOC's index 255
# Noise and soft edges come this near to black and white.
_NEAR = 24
# Classes are numbered up to this; a 255 beside them is the usual "ignore".
_MOST_CLASSES = 63
# Of the visible pixels: fewer in black or white are no drawing.
_DRAWN = 0.02
_FEW_COLOURS = 8
_LOSSY = ("JPEG", "MPO", "WEBP")


class MaskValuesError(ValueError):
    """The mask is an image, but not clearly of foreground and background."""


@dataclass(frozen=True)
class MaskRule:
    """How the masks of one form are read."""

    form: Form
    foreground: tuple[tuple[float, float], ...] | None = None  # ranges; None: all but background and ignored
    background: int = 0
    ignored: tuple[int, ...] = ()
    threshold: float | None = None  # grey levels and probabilities from here up are foreground
    bits: bool = False  # beside grey levels there may be files of 0 and 1

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return int8 of 1 (foreground), 0 and IGNORED, in the shape of the values."""
        if self.threshold is not None:
            if self.bits and values.max(initial=0) <= 1:
                return values.astype(np.int8)
            return (values >= self.threshold).astype(np.int8)
        if self.foreground is None:
            truth = (values != self.background).astype(np.int8)
        else:
            truth = np.zeros(values.shape, np.int8)
            for first, last in self.foreground:
                truth[(values >= first) & (values <= last)] = 1
        for value in self.ignored:
            truth[values == value] = IGNORED
        return truth


@dataclass
class Content:
    """What a mask file holds."""

    form: Form
    counts: dict[float, int]  # pixels by value
    palette: dict[int, int] = field(default_factory=dict)  # packed colours that are used, by index
    lossy: bool = False
    mids: tuple[int, int] = (0, 0)  # pixels between near black and near white, and how many are like the next one
    others: tuple[int, int] = (0, 0)  # the same of all that are neither 0 nor the highest of their depth
    alpha: int | None = None  # of all pixels, if there is only one colour
    drawn: bool = False  # transparency varies, but the colours that are seen could be a mask too


# --- one file ---------------------------------------------------------------------------------------------------------


def decode(image: Image.Image) -> Content:
    """Find out what a mask file holds.

    Raises:
        MaskValuesError: it is a photo, or has NaN.
    """
    if _has_alpha(image):
        whole = image.convert("RGBA")
        alpha = np.array(whole.getchannel("A"))
        if alpha.min() != alpha.max():
            colours, counts = np.unique(_packed(np.array(whole)[alpha > 0]), return_counts=True)
            drawn = _is_drawn(colours, counts)
            # Those of a photo are not kept: they are many, and a set has many photos.
            seen = dict(enumerate(colours.tolist())) if drawn else {}
            return Content("alpha", _counts(alpha), seen, drawn=drawn)
        content = decode(image.convert("LA").getchannel(0) if image.mode in ("LA", "La") else whole.convert("RGB"))
        content.alpha = int(alpha.flat[0]) if len(content.counts) == 1 else None
        return content
    if image.mode == "P" and (palette := _used_colours(image)) is not None:
        return Content("palette", _used(image), palette)
    if image.mode not in ("1", "L", "P", "F") and not image.mode.startswith("I"):
        return _decode_colours(image)
    if image.mode == "L":
        return _numbers(image, image)
    values = extract(image, "numbers")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise MaskValuesError("it has NaN or infinite values")
        low, high = float(values.min()), float(values.max())
        return Content("probabilities", {low: 1, high: 1})
    return _numbers(values, image)


def extract(image: Image.Image, form: Form) -> np.ndarray:
    """Return the values of a mask [H, W], as they are stored, when it is read as a form."""
    if form == "alpha":
        return np.array(image.convert("RGBA").getchannel("A"))
    if form == "palette":
        return np.array(image)
    if form == "colours":
        return _packed(np.array(image.convert("RGB")))
    if image.mode.startswith("I"):
        return np.array(image)
    if image.mode == "F":
        values = np.array(image)
        if form == "numbers" and np.isfinite(values).all() and (values == np.rint(values)).all():
            return values.astype(np.int64)
        return values
    return np.array(image if image.mode == "L" else image.convert("L"))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (image.mode == "P" and "transparency" in image.info)


def _used_colours(image: Image.Image) -> dict[int, int] | None:
    """Return the colours of the indices that a palette image uses; None if they are different greys."""
    colours = _packed(np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)).tolist()
    used = {index: colours[index] for index, count in enumerate(image.histogram()) if count and index < len(colours)}
    greys = {colour for colour in used.values() if colour % 0x010101 == 0}
    return None if len(greys) == len(used) else used


def _decode_colours(image: Image.Image) -> Content:
    image = image if image.mode == "RGB" else image.convert("RGB")
    found: Any = image.getcolors(256)
    if found is not None and any(len(set(colour)) > 1 for _, colour in found):
        counts = {red << 16 | green << 8 | blue: count for count, (red, green, blue) in found}
        return Content("colours", counts)
    if found is None:  # there are only 256 greys
        pixels = np.array(image)
        coloured = (pixels.max(2) - pixels.min(2) > _NEAR).mean()
        if coloured > 0.001:
            raise MaskValuesError("more than 256 colours: a photo, or colours that JPEG has blurred")
    return _numbers(image.convert("L"), image)


def _numbers(numbers: np.ndarray | Image.Image, image: Image.Image) -> Content:
    """Describe numbers, an array [H, W] or an image of mode L, of a mask file."""
    counts = _counts(numbers) if isinstance(numbers, np.ndarray) else _used(numbers)
    content = Content("numbers", counts, lossy=image.format in _LOSSY)
    if len(counts) > 2:
        values = np.asarray(numbers)
        top = _top(counts)
        same = np.zeros(values.shape, bool)
        same[:, :-1] = values[:, :-1] == values[:, 1:]
        for name, inside in (
            ("mids", (values > _NEAR) & (values < top - _NEAR)),
            ("others", (values > 0) & (values < top)),
        ):
            setattr(content, name, (int(inside.sum()), int((inside & same).sum())))
    return content


def _is_drawn(colours: np.ndarray, counts: np.ndarray) -> bool:
    """Return whether the packed colours of what is not transparent, with their pixels, could be a mask themselves."""
    large = counts >= _DRAWN * counts.sum()
    if len(colours) <= _FEW_COLOURS:
        return bool(large.sum() > 1 and (colours[large] == _BLACK).any())
    extremes = counts[large & ((colours == _BLACK) | (colours == _WHITE))]  # soft edges between them
    return bool(len(extremes) == 2 and extremes.sum() >= 0.9 * counts.sum())


def _packed(colours: np.ndarray) -> np.ndarray:
    parts = colours.astype(np.int32)
    return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]


def _counts(values: np.ndarray) -> dict[float, int]:
    if values.dtype == np.uint8:
        return _used(Image.fromarray(values))
    return dict(zip(*(each.tolist() for each in np.unique(values, return_counts=True)), strict=True))


def _used(image: Image.Image) -> dict[float, int]:
    return {value: count for value, count in enumerate(image.histogram()) if count}


def _top(values: Iterable[float]) -> int:
    return 255 if max(values) <= 255 else 65535


# --- a set ------------------------------------------------------------------------------------------------------------


def decide(
    contents: Sequence[Content], asked: Asked = NOTHING_ASKED, before: Mapping[str, Any] | None = None
) -> list[MaskRule]:
    """Return the rule of each file of a set.

    Args:
        contents: of all files.
        asked: what the user says.
        before: by form, the numbers that were ignored in the set that a network was trained on.

    Raises:
        MaskValuesError: what was found, and what to pass.
    """
    forms = [each.form for each in contents]
    if asked.alpha or (asked.says_foreground and any(each.drawn for each in contents)):
        forms = ["alpha" if asked.alpha else "colours"] * len(forms)
    elif "alpha" in forms:
        forms = ["alpha" if each.alpha is not None else form for each, form in zip(contents, forms, strict=True)]
        if any(each.drawn for each in contents):
            raise MaskValuesError(
                "transparent parts, and black and other colours in what is not transparent; give --foreground alpha "
                "for all that is not transparent, or the foreground's colours, such as --foreground ffffff"
            )
    if "palette" in forms and not _same_palettes(contents):
        forms = ["colours" if form == "palette" else form for form in forms]
    rules: dict[Form, MaskRule] = {}
    for form in dict.fromkeys(forms):
        members = [each for each, own in zip(contents, forms, strict=True) if own == form]
        ignored = tuple((before or {}).get(form, ()))
        rules[form] = _RULES[form](members, asked, ignored)
    chosen = [rules[form] for form in forms]
    found = {kind for rule, each in zip(chosen, contents, strict=True) for kind in kinds(each, rule)}
    for flag, missing in (
        ("--foreground", asked.says_foreground and 1 not in found),
        ("--ignore-index", bool(asked.ignored) and IGNORED not in found),
    ):
        if missing:
            values = sorted(
                {value for rule, each in zip(chosen, contents, strict=True) for value in _values(each, rule.form)}
            )
            raise MaskValuesError(f"{_found(values, forms[0])}, and nothing of what {flag} says")
    return chosen


def kinds(content: Content, rule: MaskRule) -> set[int]:
    """Return which of 1 (foreground), 0 and IGNORED a mask has."""
    return set(rule.apply(np.array(list(_values(content, rule.form)))).tolist())


def describe(rule: MaskRule, contents: Sequence[Content]) -> str:
    """Return how masks are read, in words; empty for black and white."""
    values = sorted({value for each in contents for value in _values(each, rule.form)})
    ignored = f"; {_shown(rule.ignored, rule.form)} ignored, in loss and metrics" if rule.ignored else ""
    if rule.form == "alpha":
        return "masks: foreground is what is not transparent"
    if rule.threshold is not None:
        soft = rule.form == "probabilities" or any(_NEAR < value < _top(values) - _NEAR for value in values)
        return f"masks: levels from {rule.threshold:g} up are foreground" if soft else ""
    if rule.foreground is not None:
        asked = ", ".join(_span(first, last, rule.form) for first, last in rule.foreground)
        return f"masks: {asked} foreground, as --foreground says{ignored}"
    if rule.form == "numbers" and len(values) <= 2 and not ignored:
        return ""
    others = [value for value in values if value not in (rule.background, *rule.ignored)]
    kind = {"numbers": "numbers", "palette": "palette indices", "colours": "colours"}[rule.form]
    if set(values) <= {0, 1, 255} and not ignored:
        return ""
    return f"masks: {kind} {_shown(others, rule.form)} foreground, {_shown([rule.background], rule.form)} not{ignored}"


def _rule_for_numbers(members: Sequence[Content], asked: Asked, before: tuple[int, ...]) -> MaskRule:
    values = sorted({value for each in members for value in each.counts})
    ignored = asked.ignored if asked.ignored is not None else tuple(int(value) for value in values if value < 0)
    if asked.says_foreground:
        ranges = _asked_ranges(asked, {value: int(value) * 0x010101 for value in values if 0 <= value <= 255})
        if asked.ignored is None and _top(values) in values:
            with suppress(MaskValuesError):
                ignored = (*ignored, *[_top(values)] * _by_convention(values, members, before))
        kept = tuple(value for value in ignored if not any(first <= value <= last for first, last in ranges))
        return MaskRule("numbers", ranges, ignored=kept)
    left = [value for value in values if value not in ignored]
    if asked.ignored is None and (len(left) > 1 or (left and left[0] not in (0, 1, 255, 65535))):
        if not _are_labels(left, members):
            return MaskRule("numbers", threshold=_half(left), bits=not any(each.lossy for each in members))
        if _by_convention(left, members, before):
            ignored = (*ignored, _top(left))
    if left and 0 not in left and left not in ([1], [255], [65535]):
        raise MaskValuesError(f"{_found(left)}, but no 0, so what is background is unclear; {_advice(left)}")
    return MaskRule("numbers", ignored=tuple(ignored))


def _are_labels(values: Sequence[float], members: Sequence[Content]) -> bool:
    """Return whether numbers stand for things, as opposed to levels of grey with noise or soft edges."""
    top, nonzero = _top(values), [value for value in values if value]
    if len(nonzero) == 1 and 0 in values:
        return True
    mids = [value for value in nonzero if value != top]
    if any(each.lossy for each in members):
        return False
    if any(top - _NEAR <= value < top for value in mids):
        total, same = map(sum, zip(*(each.mids for each in members), strict=True))
        return total > 0 and same >= total / 2
    if not mids or max(mids) <= _NEAR:
        return True
    total, same = map(sum, zip(*(each.others for each in members), strict=True))
    return total == 0 or same >= total / 2


def _by_convention(values: Sequence[float], members: Sequence[Content], before: tuple[int, ...]) -> bool:
    """Return whether the highest number of a depth means "ignore"; False if it is not there.

    Raises:
        MaskValuesError: it is unclear.
    """
    top = _top(values)
    others = [value for value in values if 0 < value < top]
    if top not in values or not others or top - 1 in others:
        return False
    holding = [each.counts.keys() for each in members if top in each.counts]
    together = sum(any(0 < value < top for value in each) for each in holding)
    if together == 0 and others == [1] and top not in before:
        return False  # some files of 0 and 1, some of 0 and 255
    numbered = max(others) <= _MOST_CLASSES or (len(others) >= max(others) / 2 and max(others) < top - 1)
    if numbered and (2 * together >= len(holding) or top in before):
        return True
    raise MaskValuesError(
        f"{_found(values)}, and {top} may be foreground or stand for pixels to ignore; {_advice(values)}"
    )


def _half(values: Sequence[float]) -> float:
    top = _top(values)
    half = (top + 1) // 2
    if max(values) < half:
        raise MaskValuesError(
            f"levels of grey from {min(values):g} to {max(values):g}, expected up to {top}; give --foreground with the "
            f"foreground's, such as --foreground {max(values) / 2:.0f}-{top}"
        )
    return half


def _rule_for_palettes(members: Sequence[Content], asked: Asked, before: tuple[int, ...]) -> MaskRule:
    palette = {index: colour for each in members for index, colour in each.palette.items()}
    values = sorted(palette)
    ignored = asked.ignored
    if ignored is None:
        void = palette.get(255) == _VOC_VOID
        is_void = 255 in values and (void or _by_convention(values, members, before))
        ignored = (255,) if is_void else ()
    else:
        by_colour = {colour: index for index, colour in palette.items()}
        ignored = tuple(by_colour.get(value, value) for value in ignored)
    if asked.says_foreground:
        ranges = _asked_ranges(asked, palette)
        kept = tuple(value for value in ignored if not any(first <= value <= last for first, last in ranges))
        return MaskRule("palette", ranges, ignored=kept)
    if palette.get(0, _BLACK) != _BLACK or (0 not in palette and _BLACK not in palette.values()):
        shown = first_few([f"{index} ({_colour(palette[index])})" for index in values], 6)
        raise MaskValuesError(
            f"palette indices {shown}, without 0 for black, so what is background is unclear; give --foreground with "
            f"the indices of the foreground, such as --foreground {values[-1]}"
        )
    if 0 not in palette:
        background = next(index for index in values if palette[index] == _BLACK)
        return MaskRule("palette", background=background, ignored=ignored)
    return MaskRule("palette", ignored=ignored)


def _rule_for_colours(members: Sequence[Content], asked: Asked, _: tuple[int, ...]) -> MaskRule:
    values = sorted({value for each in members for value in _values(each, "colours")})
    ignored = asked.ignored
    if ignored is None:
        ignored = (_VOC_VOID,) if _VOC_VOID in values and len(values) > 1 else ()
    if asked.says_foreground:
        return MaskRule("colours", _asked_ranges(asked, {value: int(value) for value in values}), ignored=ignored)
    if _BLACK not in values:
        raise MaskValuesError(
            f"the colours {_shown(values, 'colours')}, but no black, so what is background is unclear; give "
            f"--foreground with the foreground's, such as --foreground {_colour(values[0])}"
        )
    return MaskRule("colours", background=_BLACK, ignored=ignored)


def _rule_for_alpha(members: Sequence[Content], asked: Asked, _: tuple[int, ...]) -> MaskRule:
    if any(each.form != "alpha" and each.alpha is None for each in members):
        raise MaskValuesError("masks without transparent parts, though --foreground says alpha")
    values = {value for each in members if each.form == "alpha" for value in each.counts}
    if len(values - {0}) == 1:
        return MaskRule("alpha")
    return MaskRule("alpha", threshold=128)


def _rule_for_probabilities(members: Sequence[Content], asked: Asked, _: tuple[int, ...]) -> MaskRule:
    values = [value for each in members for value in each.counts]
    low, high = min(values), max(values)
    if asked.foreground:
        return MaskRule("probabilities", asked.foreground)
    top = 1 if high <= 1.1 else 255
    if low < -0.1 * top or high > 1.1 * top or (top == 255 and high < 16):
        raise MaskValuesError(
            f"values from {low:g} to {high:g}, expected 0 to 1, or 0 to 255; give --foreground with the foreground's, "
            f"such as --foreground {(low + high) / 2:g}-{high:g}"
        )
    return MaskRule("probabilities", threshold=top / 2)


_RULES: dict[Form, Any] = {
    "numbers": _rule_for_numbers,
    "palette": _rule_for_palettes,
    "colours": _rule_for_colours,
    "alpha": _rule_for_alpha,
    "probabilities": _rule_for_probabilities,
}


def _same_palettes(contents: Sequence[Content]) -> bool:
    known: dict[int, int] = {}
    palettes = [each.palette for each in contents if each.form == "palette"]
    return all(known.setdefault(index, colour) == colour for each in palettes for index, colour in each.items())


def _values(content: Content, form: Form) -> Iterable[float]:
    """Return the values of a file when it is read as a form."""
    if form == "alpha" and content.form != "alpha":
        return [content.alpha or 0]
    if form == "colours" and content.form in ("palette", "alpha"):
        return content.palette.values()
    if form == "colours" and content.form == "numbers":
        return [int(value) * 0x010101 for value in content.counts]
    return content.counts


def _asked_ranges(asked: Asked, colours: Mapping[Any, int]) -> tuple[tuple[float, float], ...]:
    """Return what --foreground says as ranges of values; `colours` are the packed colours of the values."""
    by_colour = {colour: value for value, colour in colours.items()}
    return (*asked.foreground, *((by_colour[each],) * 2 for each in asked.colours if each in by_colour))


def _found(values: Sequence[float], form: Form = "numbers") -> str:
    return f"the {'colours' if form == 'colours' else 'values'} {_shown(values, form)}"


def _advice(values: Sequence[float]) -> str:
    top = _top(values)
    others = [value for value in values if 0 < value < top]
    first = f"give --foreground with the foreground's, such as --foreground {others[0] if others else top}"
    return f"{first}, and --ignore-index with those to ignore, if any" + f", such as {top}" * (top in values)


def _span(first: float, last: float, form: Form) -> str:
    return _shown([first], form) if first == last else f"{first:g} to {last:g}"


def _shown(values: Sequence[float], form: Form) -> str:
    if form == "colours":
        return first_few([_colour(value) for value in values], 6)
    whole = [f"{value:g}" for value in values]
    contiguous = len(values) > 3 and values[-1] - values[0] == len(values) - 1
    return f"{whole[0]} to {whole[-1]}" if contiguous else first_few(whole, 8)


def _colour(value: float) -> str:
    return f"{int(value):06x}"
