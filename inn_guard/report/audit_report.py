"""AuditReport: what audit() returns, as a table for people and as JSON, data frame, Markdown or web page."""

from __future__ import annotations

import html
import json
import math
import os
import textwrap
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inn_guard.execution.files import atomic_write
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import USES, UseVerdict
from inn_guard.report.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SCHEMA", "AuditReport"]

SCHEMA = 2  #: of the JSON; raised whenever a reader of an older one would misread it
WIDTH = 100
WORDS = {
    Verdict.NOT_APPLICABLE: "-",
    Verdict.STABLE: "ok",
    Verdict.MARGINAL: "marginal",
    Verdict.UNDECIDED: "undecided",
    Verdict.UNSTABLE: "FAILS",
    Verdict.NON_FINITE: "FAILS",
}
_RESULT_FIELDS = (
    "name",
    "reason",
    "headline",
    "values",
    "units",
    "per_sample",
    "measured_mask",
    "per_layer",
    "tables",
    "settings",
    "advice",
)


@dataclass(frozen=True, eq=False)
class AuditReport:
    """All results of one audit of one model. Iterates over the results; ``report["reconstruction"]`` is one of them.

    Attributes:
        results: one per check, in the order in which they ran.
        model: the model's name.
        settings: what was audited: library, dimensions, shape, dtype and device of x, samples,
            level, seed, versions, checksum of the weights, date, seconds.
        counted: use -> why the verdict counts it; None counts every use that was measured.
        asked: checks that the caller named; a named check that decides no use counts by itself.
            None: all of them.
        advice: what to do, the most effective first; each can be followed as it stands.
    """

    results: tuple[AuditResult, ...]
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    counted: Mapping[str, str] | None = None
    asked: tuple[str, ...] | None = None
    advice: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the uses that count; undecided where nothing that decides was measured."""
        deciding = [use.verdict for use in self.uses.values() if use.counted]
        deciding += [result.verdict for result in self.results if self._counts_alone(result)]
        measured = [verdict for verdict in deciding if verdict is not Verdict.NOT_APPLICABLE]
        if measured:
            return Verdict.worst(measured)
        return Verdict.NOT_APPLICABLE if deciding else Verdict.UNDECIDED

    @property
    def uses(self) -> dict[str, UseVerdict]:
        """The verdict on every use that was measured or asked for."""
        found = {use: self._use(use) for use in USES}
        return {use: one for use, one in found.items() if one is not None}

    @property
    def failed(self) -> tuple[UseVerdict, ...]:
        """The counted uses that the model is not fit for."""
        return tuple(use for use in self.uses.values() if use.counted and use.verdict.failed)

    @property
    def worst_layer(self) -> str | None:
        """The layer that loses most digits of the inverse; None if nothing fails or no check blamed one."""
        if self.verdict < Verdict.MARGINAL:
            return None
        named = [result for result in self.results if "worst_layer" in result.settings]
        return str(named[-1].settings["worst_layer"]) if named else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checks, in the order in which they ran."""
        return tuple(result.name for result in self.results)

    def keys(self) -> KeysView[str]:
        """The names of the checks."""
        return {result.name: result for result in self.results}.keys()

    def items(self) -> ItemsView[str, AuditResult]:
        """(name, result) of every check."""
        return {result.name: result for result in self.results}.items()

    def __iter__(self) -> Iterator[AuditResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, name: str) -> AuditResult:
        """The result of the check of that name."""
        for result in self.results:
            if result.name == name:
                return result
        hint = ""
        if name in USES:
            hint = f"; {name!r} is a use: report.uses[{name!r}]"
        raise KeyError(f"no check {name!r} in this report; it has {', '.join(self.names)}{hint}")

    def __contains__(self, name: object) -> bool:
        """Whether a check of that name ran."""
        return name in self.names

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AuditReport):
            return NotImplemented
        same_model = self.model == other.model and self.settings == other.settings
        return same_model and self.results == other.results and self.advice == other.advice

    def __hash__(self) -> int:
        return hash((self.model, self.results))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [_title(self.subject, self.headline), ""]
        for use in self._ordered_uses():
            lines += _use_lines(use)
        for result in self.results:
            if self._counts_alone(result):
                label = result.name.replace("_", " ")
                lines += _row(label, WORDS[result.verdict], result.reason)
        remarks = self._remarks()
        if remarks:
            lines += ["", *remarks]
        return "\n".join(
            [*lines, 'details: print(report.details()), report.to_html("report.html")']
        )

    @property
    def headline(self) -> str:
        """What the first line ends with: how many of the counted uses fail."""
        counted = [use for use in self.uses.values() if use.counted and use.finding is not None]
        counted = [use for use in counted if use.verdict is not Verdict.NOT_APPLICABLE]
        failed = len(self.failed)
        if failed:
            return f"{failed} of {len(counted)} uses {'FAILS' if failed == 1 else 'FAIL'}"
        if self.verdict in (Verdict.STABLE, Verdict.MARGINAL) and counted:
            extra = ", some marginal" if self.verdict is Verdict.MARGINAL else ""
            return f"all {len(counted)} uses ok{extra}" if len(counted) > 1 else f"ok{extra}"
        return self.verdict.label.replace("_", " ").upper()

    @property
    def subject(self) -> str:
        """The model and the data in one line."""
        settings = self.settings
        library = f" ({settings['library']})" if settings.get("library") else ""
        parts = [f"{self.model or 'model'}{library}"]
        if "dimensions" in settings:
            parts.append(f"{settings['dimensions']:,} dimensions")
        if "dtype" in settings:
            parts.append(str(settings["dtype"]))
        if "samples" in settings:
            parts.append(f"{settings['samples']:,} samples")
        return ", ".join(parts)

    def details(self) -> str:
        """Every check with its verdict, the figures that decided it and its reason."""
        width = max((len(name) for name in self.names), default=0)
        how = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [_title(self.subject, self.headline), *_wrapped(how, ""), ""]
        for result in self.results:
            head = f"{result.name:<{width}}  {result.verdict.label:<14}  {_figures(result)}"
            lines.append(head.rstrip())
            lines += _wrapped(result.reason, "    ")
            if result.advice:
                lines += _wrapped(f"What to do: {result.advice}", "    ")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The whole report in JSON's own types; NaN and Inf are the strings "nan", "inf", "-inf"; no images."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "verdict": self.verdict.label,
            "uses": {name: _use_row(use) for name, use in self.uses.items()},
            "counted": None if self.counted is None else dict(self.counted),
            "asked": None if self.asked is None else list(self.asked),
            "worst_layer": self.worst_layer,
            "advice": list(self.advice),
            "settings": _plain(self.settings),
            "results": [_result_row(result) for result in self.results],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as JSON text; ``inn_guard.load`` reads it.

        Args:
            path: file to write, atomically; its folder must exist. None writes nothing.

        Returns:
            the JSON text.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            with atomic_write(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    def to_markdown(self) -> str:
        """The uses as a Markdown table, and the advice as a list."""
        lines = [
            f"**{self.subject}: {self.headline}**",
            "",
            "| use | verdict | finding |",
            "|---|---|---|",
        ]
        for use in self._ordered_uses():
            reason = _cell(use.reason + _aside(use))
            lines.append(f"| {use.use.replace('_', ' ')} | {use.verdict.label} | {reason} |")
        if self.advice:
            lines += ["", *(f"{k}. {_cell(text)}" for k, text in enumerate(self.advice, start=1))]
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """One row per named value of every result; needs pandas, which the extra ``report`` brings."""
        from inn_guard.report.data_frame import frame

        return frame(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One self-contained page with tables and plots; needs the extra ``report``."""
        from inn_guard.report.html import write_html

        write_html(self, path)

    def _repr_html_(self) -> str:
        """The uses as a table, for notebooks."""
        rows = "".join(_html_row(use) for use in self._ordered_uses())
        advice = "".join(f"<li>{html.escape(text)}</li>" for text in self.advice)
        listed = f"<ol>{advice}</ol>" if advice else ""
        title = f"{html.escape(self.subject)}: <b>{html.escape(self.headline)}</b>"
        head = "<tr><th>use</th><th>verdict</th><th>finding</th></tr>"
        return f"<p>{title}</p><table>{head}{rows}</table>{listed}"

    def _use(self, use: str) -> UseVerdict | None:
        found = [(result.name, result.uses[use]) for result in self.results if use in result.uses]
        counted = self.counted is None or use in self.counted
        why = "" if self.counted is None else self.counted.get(use, "not counted")
        if found:
            check, finding = max(found, key=lambda pair: pair[1].verdict)
            return UseVerdict(use, finding.verdict, check, finding, counted, why)
        if self.counted is not None and self.counted.get(use) == NAMED:
            return UseVerdict(use, Verdict.UNDECIDED, "", None, True, why)
        return None

    def _counts_alone(self, result: AuditResult) -> bool:
        """Whether a check that decides no use counts by itself."""
        if result.uses or result.name in ("preflight", "dry_run"):
            return False
        return self.asked is None or result.name in self.asked

    def _ordered_uses(self) -> list[UseVerdict]:
        """Counted uses first, and of these the worst first."""
        uses = list(self.uses.values())
        return sorted(uses, key=lambda use: (not use.counted, -list(Verdict).index(use.verdict)))

    def _remarks(self) -> list[str]:
        lines = []
        if self.worst_layer is not None:
            lines += _row("weakest layer", None, self.worst_layer)
        lowest = [
            result.settings["lowest"] for result in self.results if "lowest" in result.settings
        ]
        if lowest:
            lines += _row("lowest precision", None, str(lowest[0]))
        for number, text in enumerate(self.advice, start=1):
            lines += _row("what to do" if number == 1 else "", None, f"{number}. {text}")
        return lines


NAMED = "named by the caller"  #: why a use counts that ``uses=`` names

_LABEL, _WORD = 18, 10  #: columns of the printed table


def _title(left: str, right: str) -> str:
    if len(left) + len(right) + 2 > WIDTH:
        return f"{left}\n{right:>{WIDTH}}"
    return f"{left}{right:>{WIDTH - len(left)}}"


def _row(label: str, word: str | None, text: str) -> list[str]:
    """Label, word and text in columns; the text is wrapped, further lines in it are code and stay.

    Without a word the text begins in the word's column.
    """
    head = f"  {label:<{_LABEL - 2}} "
    if word is not None:
        head += f"{word:<{_WORD}}"
    indent = " " * len(head)
    prose, *code = text.split("\n")
    lines = textwrap.wrap(
        prose,
        WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*(lines or [head.rstrip()]), *(indent + line for line in code)]


def _use_lines(use: UseVerdict) -> list[str]:
    word = WORDS[use.verdict] if use.counted else "-"
    return _row(use.use.replace("_", " "), word, use.reason + _aside(use))


def _aside(use: UseVerdict) -> str:
    """Why a use is not counted, in brackets."""
    if use.counted:
        return ""
    if use.verdict is Verdict.NOT_APPLICABLE:
        return " (not counted)"
    word = "" if use.verdict is Verdict.STABLE else f"{use.verdict.label.replace('_', ' ')}, "
    return f" ({word}{use.why})" if use.why.startswith("not counted") else f" ({word}not counted)"


def _figures(result: AuditResult) -> str:
    parts = []
    for name in result.shown:
        unit = result.units.get(name, "")
        parts.append(f"{name.replace('_', ' ')} {result.values[name]:.3g} {unit}".rstrip())
    return ", ".join(parts)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table or one item of a list."""
    return text.replace("|", "\\|").replace("\n", " ")


def _html_row(use: UseVerdict) -> str:
    cells = (use.use.replace("_", " "), use.verdict.label, use.reason + _aside(use))
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _use_row(use: UseVerdict) -> dict[str, Any]:
    row = {
        "verdict": use.verdict.label,
        "check": use.check,
        "counted": use.counted,
        "figure": use.figure,
        "limit": use.limit,
        "unit": use.unit,
        "samples": use.samples,
        "of": use.of,
        "reason": use.reason,
    }
    return {key: _plain(value) for key, value in row.items()}


def _result_row(result: AuditResult) -> dict[str, Any]:
    uses = {}
    for name, finding in result.uses.items():
        row = {**vars(finding), "verdict": finding.verdict.label}
        uses[name] = {key: _plain(value) for key, value in row.items()}
    plain = {key: _plain(getattr(result, key)) for key in _RESULT_FIELDS}
    return {"verdict": result.verdict.label, "uses": uses, **plain}


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value)
