"""`cableway models`: what can be loaded, and how each architecture was verified."""

import click

from cableway.workers import models


def rows() -> list[tuple[str, str, str, str]]:
    """(architecture, family file, kinds of checkpoint, how it was verified), file by file."""
    return sorted(
        ((a.name, a.file, ", ".join(a.schemes), a.verified) for a in models.architectures()),
        key=lambda row: (row[1], row[0]),
    )


def markdown() -> str:
    """README's table: a row a family file."""
    lines = ["| file | architectures (* = by a relative's checkpoint, rewritten into the family's names and packing) |"]
    lines.append("|---|---|")
    by_file: dict[str, list[str]] = {}
    for name, file, _, verified in rows():
        mark = {models.registry.TRANSFORMERS: "", models.registry.UNVERIFIED: " (unverified)"}.get(verified, "*")
        by_file.setdefault(file, []).append(name + mark)
    lines += [f"| [`{file}`](workers/models/{file}) | {', '.join(names)} |" for file, names in by_file.items()]
    return "\n".join(lines)


@click.command()
@click.option("--markdown", "as_markdown", is_flag=True, help="Print README's table.")
def command(as_markdown: bool) -> None:
    """List the architectures that can be loaded, and how each was verified."""
    if as_markdown:
        click.echo(markdown())
        return
    table = [("ARCHITECTURE", "FILE", "CHECKPOINTS", "VERIFIED BY"), *rows()]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())
