"""A diagnosis for people; its words tell what is wrong without colour."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..programs.printing import printable
from .examination import Diagnosis
from .findings import Finding, State

_STYLES = {State.OK: "green", State.FAILED: "bold red", State.NOTE: "yellow", State.ABSENT: "dim"}


def render(diagnosis: Diagnosis) -> RenderableType:
    """For rich's console: environment, model, a line for each check, and last the sum of it; without a refusal."""
    blocks: list[RenderableType] = [_environment(diagnosis), "", _checks(diagnosis.findings), ""]
    if diagnosis.warnings:
        blocks += [_list("Warnings of libraries", diagnosis.warnings), ""]
    return Group(*blocks, _summary(diagnosis)) if diagnosis.refusal is None else Group(*blocks[:-1])


def _environment(diagnosis: Diagnosis) -> Table:
    environment, table = diagnosis.environment, _grid()
    table.add_row("Versions", _pairs(environment.versions))
    table.add_row("Optional", _pairs(environment.optional) or "none of those that are known here")
    for name, value in environment.machine.items():
        if value:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(name[0].upper() + name[1:], Text(printable(text)))
    model = "not loaded" if diagnosis.model is None else diagnosis.model
    table.add_row("Model", Text(printable(f"{diagnosis.folder}: {model}")))
    return table


def _pairs(versions: dict[str, str | None] | dict[str, str]) -> Text:
    return Text(printable(", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())))


def _checks(findings: list[Finding]) -> Table:
    table, group = _grid(3), ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            table.add_row(Text(group.capitalize(), style="bold"))
        outcome = finding.outcome
        state = Text(outcome.state.value, style=_STYLES[outcome.state])
        table.add_row(Text(f"  {finding.name}"), state, Text(printable(outcome.detail)))
    return table


def _list(title: str, lines: list[str]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold")
    table.add_row(Text(title, style="bold yellow"))
    for line in lines:
        table.add_row(Text(f"  {printable(line)}"))
    return table


def _summary(diagnosis: Diagnosis) -> Text:
    failed = [finding.name for finding in diagnosis.findings if finding.failed]
    if failed:
        return Text(
            f"Something is wrong here, {len(failed)} of {len(diagnosis.findings)}: {', '.join(failed)}.", "bold red"
        )
    return Text("Nothing is wrong.", style="green")


def _grid(columns: int = 2) -> Table:
    table = Table.grid(padding=(0, 2))
    for column in range(columns):
        last = column == columns - 1
        table.add_column(overflow="fold", no_wrap=not last, style="" if columns == 3 or last else "cyan")
    return table
