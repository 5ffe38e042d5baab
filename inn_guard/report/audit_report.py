"""AuditReport: what audit() returns, as a printed table, JSON, data frame, Markdown or web page."""

from __future__ import annotations

import html
import importlib.util
import json
import math
import os
import textwrap
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from inn_guard.execution.files import atomic_write
from inn_guard.report.exchange import badge, junit, model_card
from inn_guard.report.result import WIDTH, AuditResult, wrapped
from inn_guard.report.uses import USES, UseVerdict
from inn_guard.report.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NAMED", "SCHEMA", "AuditReport", "Row", "require"]

SCHEMA = 2  #: of the JSON; raised whenever a reader of an older one would misread it
_LABEL, _WORD = 16, 10  #: least widths of the first two columns of the printed table
NAMED = "named by the caller"  #: why a use counts that ``uses=`` names
#: what the printed table calls a verdict
WORDS = {
    Verdict.NOT_APPLICABLE: "-",
    Verdict.STABLE: "ok",
    Verdict.MARGINAL: "marginal",
    Verdict.UNDECIDED: "undecided",
    Verdict.UNSTABLE: "FAILS",
    Verdict.NON_FINITE: "FAILS",
}
_OF_THE_RUN = ("date", "seconds")  #: settings in which two reports of the same audit differ
#: what `to_dict` copies from a result; images would make the JSON unreadable
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


class Row(NamedTuple):
    """One entry of the printed report.

    Attributes:
        label: what it is about.
        word: the verdict in one word; None where there is none.
        text: what was found. Further lines are code.
    """

    label: str
    word: str | None
    text: str


@dataclass(frozen=True, eq=False)
class AuditReport:
    """All results of one audit. Iterates over them; ``report["reconstruction"]`` is one of them.

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
        """The worst verdict of the uses that count; undecided if none of them was measured."""
        deciding = [use.verdict for use in self._counted()]
        deciding += [result.verdict for result in self.alone]
        if not deciding:
            return Verdict.UNDECIDED
        # not_applicable is the lowest verdict: it is the worst only where nothing was measured
        return Verdict.worst(deciding)

    @property
    def uses(self) -> dict[str, UseVerdict]:
        """The verdict on every use that was measured or asked for."""
        found = {}
        for use in USES:
            one = self._use(use)
            if one is not None:
                found[use] = one
        return found

    @property
    def failed(self) -> tuple[UseVerdict, ...]:
        """The counted uses that the model is not fit for."""
        return tuple(use for use in self._counted() if use.verdict.failed)

    @property
    def worst_layer(self) -> str | None:
        """The layer that loses most digits; None if nothing fails, or no check names one."""
        if self.verdict < Verdict.MARGINAL:
            return None
        for result in reversed(self.results):
            if "worst_layer" in result.settings:
                return str(result.settings["worst_layer"])
        return None

    @property
    def alone(self) -> tuple[AuditResult, ...]:
        """The results that decide no use and count by themselves, since the caller named them."""
        return tuple(filter(self._counts_alone, self.results))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checks, in the order in which they ran."""
        return tuple(result.name for result in self.results)

    def keys(self) -> KeysView[str]:
        """The names of the checks."""
        return self._by_name().keys()

    def items(self) -> ItemsView[str, AuditResult]:
        """Pairs (name, result), one for every check."""
        return self._by_name().items()

    def __iter__(self) -> Iterator[AuditResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, name: str) -> AuditResult:
        """The result of the check of that name."""
        if isinstance(name, str) and name in self:
            return self._by_name()[name]
        hint = ""
        if isinstance(name, str) and name in USES:
            hint = f"; {name!r} is a use: report.uses[{name!r}]"
        has = ", ".join(self.names) or "none"
        raise KeyError(f"no check {name!r} in this report; it has {has}{hint}")

    def __contains__(self, name: object) -> bool:
        """Whether a check of that name ran."""
        return name in self.names

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AuditReport):
            return NotImplemented
        same_model = self.model == other.model and self._repeatable == other._repeatable
        return same_model and self.results == other.results and self.advice == other.advice

    @property
    def _repeatable(self) -> dict[str, Any]:
        """The settings without what differs from run to run."""
        return {key: value for key, value in self.settings.items() if key not in _OF_THE_RUN}

    def __hash__(self) -> int:
        return hash((self.model, self.results))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        findings, remarks = self.findings(), self.remarks()
        width = max(_LABEL, *(len(row.label) for row in (*findings, *remarks)), 0)
        lines = [_title(self.subject, self.headline), ""]
        for row in findings:
            lines += _wrapped_row(row, width)
        if remarks:
            lines.append("")
        for row in remarks:
            lines += _wrapped_row(row, width)
        lines.append('details: print(report.details()), report.to_html("report.html")')
        return "\n".join(lines)

    def findings(self) -> list[Row]:
        """The upper part of the printed report: one entry for each use, the counted ones first."""
        rows = [_use_row(use) for use in self.sorted_uses()]
        for result in self.results:
            # an estimate of the cost decides nothing, but is all that a dry run has to say
            if result in self.alone or result.name == "dry_run":
                word = WORDS[result.verdict]
                rows.append(Row(result.name.replace("_", " "), word, result.reason))
        return rows

    def remarks(self) -> list[Row]:
        """The lower part of the printed report: weakest layer, lowest precision, advice."""
        rows = []
        if "convention" in self.settings:
            rows.append(Row("recognised", None, str(self.settings["convention"])))
        if self.worst_layer is not None:
            rows.append(Row("weakest layer", None, self.worst_layer))
        for result in self.results:
            if "lowest" in result.settings:
                rows.append(Row("lowest precision", None, str(result.settings["lowest"])))
        label = "what to do"
        for number, text in enumerate(self.advice, start=1):
            rows.append(Row(label, None, f"{number}. {text}"))
            label = ""
        return rows

    @property
    def headline(self) -> str:
        """What the first line ends with: how many of the counted uses fail."""
        if self.names == ("dry_run",):
            return "dry run: nothing was measured"
        counted = 0
        for use in self._counted():
            if use.finding is not None and use.verdict is not Verdict.NOT_APPLICABLE:
                counted += 1
        failed = len(self.failed)
        if failed == counted == 1:
            return "FAILS"
        if failed:
            verb = "FAILS" if failed == 1 else "FAIL"
            return f"{failed} of {counted} uses {verb}"
        if not self.verdict.passed or not counted:
            return self.verdict.label.replace("_", " ").upper()
        text = {1: "ok", 2: "both uses ok"}.get(counted, f"all {counted} uses ok")
        if self.verdict is Verdict.MARGINAL:
            text += ", some marginal"
        return text

    @property
    def subject(self) -> str:
        """The model and the data in one line."""
        settings = self.settings
        name = self.model or "model"
        library = str(settings.get("library", ""))
        if library and library not in name:
            name = f"{name} ({library})"
        parts = [name]
        if "dimensions" in settings:
            parts.append(f"{settings['dimensions']:,} dimensions")
        if "dtype" in settings:
            parts.append(str(settings["dtype"]))
        if "samples" in settings:
            parts.append(f"{settings['samples']:,} samples")
        return ", ".join(parts)

    def details(self) -> str:
        """Every check with its verdict, the figures that decided it and its reason."""
        how = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [_title(self.subject, self.headline), *wrapped(how, ""), ""]
        return "\n".join([*lines, *map(str, self.results)])

    def to_dict(self) -> dict[str, Any]:
        """The whole report without images, in JSON's own types.

        NaN and Inf are the strings "nan", "inf" and "-inf".
        """
        uses = {}
        for name, use in self.uses.items():
            uses[name] = _use_fields(use)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "verdict": self.verdict.label,
            "uses": uses,
            "counted": _plain(self.counted),
            "asked": _plain(self.asked),
            "worst_layer": self.worst_layer,
            "advice": list(self.advice),
            "settings": _plain(self.settings),
            "results": list(map(_result_row, self.results)),
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
            f"**{_cell(self.subject)}: {self.headline}**",
            "",
            "| use | verdict | finding |",
            "|---|---|---|",
        ]
        for use in self.sorted_uses():
            reason = _cell(use.reason + _aside(use))
            lines.append(f"| {use.use.replace('_', ' ')} | {use.verdict.label} | {reason} |")
        if self.advice:
            lines.append("")
        for number, text in enumerate(self.advice, start=1):
            lines += _markdown_item(number, text)
        return "\n".join(lines)

    def to_junit(self, path: str | os.PathLike[str] | None = None) -> str:
        """JUnit XML with one test case for each use, as CI servers read it.

        Args:
            path: file to write, atomically. None writes nothing.

        Returns:
            the XML text.
        """
        text = junit(self)
        if path is not None:
            with atomic_write(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    def to_badge(self) -> dict[str, Any]:
        """The verdict as the JSON of a badge endpoint: schemaVersion, label, message, color."""
        return badge(self)

    def to_model_card(self) -> str:
        """A model card in Markdown: the figures as a ``model-index``, then the table of uses."""
        return model_card(self)

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per named value of every result.

        Raises:
            ImportError: without pandas, which the extra ``report`` brings.
        """
        require("to_frame", "pandas")
        from inn_guard.report.data_frame import frame

        return frame(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with tables and plots to ``path``.

        Raises:
            ImportError: without jinja2 and matplotlib, which the extra ``report`` brings.
        """
        require("to_html", "jinja2", "matplotlib")
        from inn_guard.report.html import write_html

        write_html(self, path)

    def figures(self) -> dict[str, str]:
        """The figures of the page as SVG text, by names that are fit for files.

            for name, svg in report.figures().items():
                pathlib.Path(f"{name}.svg").write_text(svg)

        Raises:
            ImportError: without matplotlib, which the extra ``report`` brings.
        """
        require("figures", "matplotlib")
        from inn_guard.report.sections import figures

        return figures(self.results)

    def _repr_html_(self) -> str:
        """The uses as a table, for notebooks."""
        rows = "".join(map(_html_row, self.sorted_uses()))
        listed = "".join(map(_html_item, self.advice))
        if listed:
            listed = f"<ol>{listed}</ol>"
        title = f"{html.escape(self.subject)}: <b>{html.escape(self.headline)}</b>"
        head = "<tr><th>use</th><th>verdict</th><th>finding</th></tr>"
        return f"<p>{title}</p><table>{head}{rows}</table>{listed}"

    def sorted_uses(self) -> list[UseVerdict]:
        """All uses, the counted ones first, and of these the worst first."""
        # sorting is stable: the second sort keeps the order of the first
        uses = sorted(self.uses.values(), key=lambda use: use.verdict, reverse=True)
        return sorted(uses, key=lambda use: not use.counted)

    def _by_name(self) -> dict[str, AuditResult]:
        """The results by name; of several with one name the first."""
        named: dict[str, AuditResult] = {}
        for result in self.results:
            named.setdefault(result.name, result)
        return named

    def _counted(self) -> list[UseVerdict]:
        return [use for use in self.uses.values() if use.counted]

    def _use(self, use: str) -> UseVerdict | None:
        """What all checks together found about one use; None if none did and nobody asked."""
        counted = True
        why = ""
        if self.counted is not None:
            counted = use in self.counted
            why = self.counted.get(use, "not counted")
        deciding = None
        for result in self.results:
            if use not in result.uses:
                continue
            if result.name == "preflight":
                # calls are not of one map: what other checks measured means nothing
                deciding = result
                break
            # of equal findings the first one speaks
            if deciding is None or result.uses[use].verdict > deciding.uses[use].verdict:
                deciding = result
        if deciding is not None:
            finding = deciding.uses[use]
            return UseVerdict(use, finding.verdict, deciding.name, finding, counted, why)
        if counted and why == NAMED:
            return UseVerdict(use, Verdict.UNDECIDED, "", None, counted, why)
        return None

    def _counts_alone(self, result: AuditResult) -> bool:
        """Whether a check that decides no use counts by itself."""
        if result.uses or result.name in ("preflight", "dry_run"):
            return False
        return self.asked is None or result.name in self.asked


def require(what: str, *libraries: str) -> None:
    """Refuse a method whose libraries are not installed, with the remedy.

    Args:
        what: the method.
        libraries: by the names under which they are imported.

    Raises:
        ImportError: if one is missing.
    """
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        needed = " and ".join(libraries)
        absent = " and ".join(missing)
        raise ImportError(
            f"{what} needs {needed}; {absent} cannot be found: pip install '.[report]'"
        )


def _title(left: str, right: str) -> str:
    """Both texts at the two ends of one line, or on two lines if they do not fit."""
    if len(left) + len(right) + 2 > WIDTH:
        return f"{left}\n{right:>{WIDTH}}"
    return f"{left}{right:>{WIDTH - len(left)}}"


def _wrapped_row(row: Row, width: int) -> list[str]:
    """Label, word and text in columns; the text is wrapped, further lines in it are code and stay.

    Without a word the text begins in the word's column.
    """
    label, word, text = row
    head = f"  {label:<{width}} "
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
    if not lines:
        lines = [head.rstrip()]
    for line in code:
        lines.append(indent + line)
    return lines


def _use_row(use: UseVerdict) -> Row:
    """The entry of one use in the printed report."""
    word = "-"
    if use.counted:
        word = WORDS[use.verdict]
    return Row(use.use.replace("_", " "), word, use.reason + _aside(use))


def _aside(use: UseVerdict) -> str:
    """Why a use is not counted, in brackets."""
    if use.counted:
        return ""
    if use.verdict is Verdict.NOT_APPLICABLE:
        return " (not counted)"
    why = "not counted"
    if use.why.startswith("not counted"):
        why = use.why
    if use.verdict is not Verdict.STABLE:
        why = f"{use.verdict.label.replace('_', ' ')}, {why}"
    return f" ({why})"


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table or one item of a list; nothing in it is markup."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def _markdown_item(number: int, text: str) -> list[str]:
    """One advice: prose, and further lines as code."""
    prose, *code = text.split("\n")
    lines = [f"{number}. {_cell(prose)}"]
    if code:
        lines += ["", *textwrap.indent("\n".join(["```python", *code, "```"]), "   ").split("\n")]
    return lines


def _html_row(use: UseVerdict) -> str:
    cells = (use.use.replace("_", " "), use.verdict.label, use.reason + _aside(use))
    return f"<tr><td>{'</td><td>'.join(map(html.escape, cells))}</td></tr>"


def _html_item(text: str) -> str:
    """One advice: prose, and further lines as code."""
    prose, _, code = text.partition("\n")
    if not code:
        return f"<li>{html.escape(prose)}</li>"
    return f"<li>{html.escape(prose)}<pre>{html.escape(code)}</pre></li>"


def _use_fields(use: UseVerdict) -> dict[str, Any]:
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
    return _plain(row)


def _result_row(result: AuditResult) -> dict[str, Any]:
    row: dict[str, Any] = {"verdict": result.verdict.label}
    uses = {}
    for name, finding in result.uses.items():
        uses[name] = {**vars(finding), "verdict": finding.verdict.label}
    row["uses"] = _plain(uses)
    for field_name in _RESULT_FIELDS:
        row[field_name] = _plain(getattr(result, field_name))
    return row


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)
