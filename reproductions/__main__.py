"""`python -m reproductions`: one command line for all experiments."""

import typer

from reproductions.mini.commands import app as mini
from reproductions.paper.commands import register

app = typer.Typer(
    help="Experiments with MDGD: the paper's own with LLaVA and MiniCPM, and a small one.", no_args_is_help=True
)
register(app)
app.add_typer(mini, name="mini")

if __name__ == "__main__":
    app(prog_name="python -m reproductions")
