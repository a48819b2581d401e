"""Many at once, for long: whether every reply is that of a quiet machine, and whether anything grows.

    python benchmarks/soak.py chat [--replies 2000] [--threads 8]
    python benchmarks/soak.py serve [--replies 2000] [--clients 32]
    python benchmarks/soak.py page [--visitors 50] [--turns 4]

Each prints the machine with its versions, how many replies were equal to their twins, which were made one after the
other, and what the process held after each round. Ends with 1 where a reply differs or something has grown.
"""

from __future__ import annotations

import soak_chat
import soak_page
import soak_serve
import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for name, command in (("chat", soak_chat.command), ("serve", soak_serve.command), ("page", soak_page.command)):
    app.command(name)(command)


if __name__ == "__main__":
    app()
