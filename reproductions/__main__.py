"""`python -m reproductions`: one command line for all experiments."""

import typer

from reproductions.mini.commands import app as mini

app = typer.Typer(help="Experiments with MDGD.", no_args_is_help=True)
app.add_typer(mini, name="mini")

if __name__ == "__main__":
    app(prog_name="python -m reproductions")
