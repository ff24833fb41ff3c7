"""Measures and numbers as the report says them."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fastpo.lab.statistics import Difference, Interval

MINUS, DASH, PLUS_MINUS = "\u2212", "\u2013", "\u00b1"


class Measure(NamedTuple):
    """How a measure is said.

    Attributes:
        label: in a sentence.
        short: over a column.
        better: 1 where more is better, -1 where less is, 0 where neither.
        scale: what values are multiplied by before they are shown.
        digits: after the point.
        unit, step: of a value, and of a difference of two.
        about: what it is.
    """

    label: str
    short: str
    better: int = 0
    scale: float = 1.0
    digits: int = 2
    unit: str = ""
    step: str = ""
    about: str = ""


def _percent(label: str, short: str, about: str) -> Measure:
    return Measure(label, short, 1, 100.0, 1, "%", "points", about)


def _plain(label: str, short: str, unit: str, digits: int, about: str, better: int = 0) -> Measure:
    return Measure(label, short, better, digits=digits, unit=unit, step=unit, about=about)


def _text(label: str) -> Measure:
    return Measure(label, label, 1, digits=1, step="points", about=f"{label} of responses against the chosen ones")


def _scale(label: str, short: str, how: str = " over held-out prompts", better: int = 0) -> Measure:
    return Measure(label, short, better, about=label + how)


MEASURES: dict[str, Measure] = {
    "accuracy": _percent("held-out accuracy", "accuracy", "held-out pairs whose better response is preferred"),
    "win_rate": _percent("win rate", "win rate", "samples with more reward than the reference's, a tie is half"),
    "reward": Measure("reward of samples", "reward", 1, digits=3, about="mean reward of sampled responses"),
    "kl": _plain("KL", "KL", "nats", 2, "divergence of policy from reference, a response"),
    "margin": Measure("margin", "margin", 0, about="implicit reward of the better response less that of the other"),
    "nll": _plain("negative log-likelihood", "nll", "nats", 3, "negative log-likelihood of raters' labels", better=-1),
    "ece": Measure("calibration error", "ece", -1, digits=3, about="expected calibration error of raters' labels"),
    "length": _plain("length of samples", "length", "tokens", 1, "mean of samples"),
    "finished": Measure("finished samples", "finished", 0, 100.0, 1, "%", "points", "samples that come to an end"),
    "bleu": _text("BLEU"),
    "chrf": _text("chrF"),
    "rouge_l": _text("ROUGE-L"),
    "s/reliability": _scale("rank correlation of s(x) with reliability", "s ~ reliability", ", Spearman's", better=1),
    "s/hard": _scale("rank correlation of s(x) with hardness", "s ~ hard", ", Spearman's"),
    "s/mean": _scale("mean of s(x)", "s mean"),
    "s/std": _scale("deviation of s(x)", "s std"),
    "s/min": _scale("least s(x)", "s min"),
    "s/max": _scale("greatest s(x)", "s max"),
}  # fmt: skip


def measure(name: str) -> Measure:
    """How a measure is said; an unknown one by its name."""
    return MEASURES.get(name) or Measure(name, name, digits=3)


def number(value: float, name: str, sign: bool = False) -> str:
    """A value of a measure, without its unit."""
    shown = measure(name)
    text = f"{value * shown.scale:{'+' if sign else ''}.{shown.digits}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")  # neither less nor more than nothing
    return text.replace("-", MINUS)


def plus_minus(interval: Interval, name: str) -> str:
    """Half the interval's width; nothing for one value."""
    return "" if interval.half is None else f"{PLUS_MINUS}{number(interval.half, name)}"


def p_value(p: float | None) -> str:
    """As in "p = 0.012"."""
    if p is None:
        return "no p-value"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.995 else "p = 1"


def counted(count: int, noun: str) -> str:
    """As in "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def range_of(interval: Interval, name: str) -> str:
    """As in "95 % interval 0.9 to 2.7"."""
    if interval.low is None or interval.high is None:
        return "one seed, so no interval"
    return f"95 % interval {number(interval.low, name)} to {number(interval.high, name)}"


def verdict(difference: Difference, name: str) -> str:
    """better, worse, more, less, or open where the interval holds zero or there is none."""
    interval, better = difference.interval, measure(name).better
    if interval.holds_zero:
        return "open"
    if not better:
        return "more" if interval.mean > 0 else "less"
    return "better" if interval.mean * better > 0 else "worse"


def sentence(method: str, against: str, difference: Difference, name: str, p_holm: float | None, tests: int) -> str:
    """What one difference says, with how sure it is.

    Args:
        tests: how many methods the p-value was corrected for.
    """
    interval, shown = difference.interval, measure(name)
    step = f"{shown.step} of " if shown.step else ""
    said = f"{method} against {against}: {number(interval.mean, name, sign=True)} {step}{shown.label}"
    if interval.low is None:
        return f"{said}, from one seed: no interval, nothing is shown."
    said += f", {range_of(interval, name)}, {counted(interval.n, 'seed')}, {p_value(difference.p_t)}"
    if tests > 1:
        said += f" ({p_value(p_holm)} corrected for {tests} methods)"
    return said + (". The interval holds zero: no difference is shown." if interval.holds_zero else ".")


def flow(text: str) -> str:
    """HTML of a text whose numbers are not torn from what they belong to."""
    return (
        escape(text).replace("p = ", "p&nbsp;=&nbsp;").replace("p &lt; ", "p&nbsp;&lt;&nbsp;").replace(" %", "&nbsp;%")
    )


def listed(words: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, kind: str = "") -> str:
    """An HTML table in a box of its own, which scrolls where it is too wide.

    Args:
        head: HTML of the columns' heads; rows: whole cells, <td> or <th>, of each row.
    """
    columns = "".join(f'<th scope="col">{text}</th>' for text in head)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="{kind}">'
        f"<thead><tr>{columns}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )
