"""`farebox records`: pack the recorded answers of remote models into an archive, or verify one."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import typed_values
from pipeline.config.compose import compose
from pipeline.config.files import file_of
from pipeline.errors import ConfigError
from pipeline.remote.archive import ROOT, Contents, pack, verify
from pipeline.sweep.storage import open_store


def run(verb: str, arguments: Sequence[str]) -> str:
    """Run `pack` or `verify` and return the text to print.

    Raises:
        ConfigError: the arguments are wrong, or there is nothing to pack.
        DataError: a record or the archive is damaged.
    """
    return _pack(arguments) if verb == "pack" else _verify(arguments)


def _pack(arguments: Sequence[str]) -> str:
    files = [argument for argument in arguments if argument.startswith("to=")]
    if len(files) != 1:
        raise ConfigError("name one archive, as in farebox records pack storage=runs/mine to=records.tar")
    to = typed_values.path("to", files[0].removeprefix("to=")).absolute()
    config = compose([argument for argument in arguments if argument not in files])
    models = set(open_store(config).read()["model_digest"].to_pylist())
    named = [argument.removeprefix("model=") for argument in arguments if argument.startswith("model=")]
    model = named[-1] if named else None  # as for every override, the last one counts
    if model is not None and (config.model.http is None or config.model.http.model_identity not in models):
        raise ConfigError(
            f"model={model}: no row of {config.storage} is of this model: name the card that it was run with"
        )
    card = file_of("model", model) if model is not None else None
    contents = pack(config.records, models, to, card)
    words = (
        f"model={ROOT}/{card.name} offline=true" if card else "offline=true and the model's card (model=CARD packs it)"
    )
    return (
        f"packed {_text(contents)} into {to}; unpack it beside a storage (tar -xf {to.name}) as the folder {ROOT}, and "
        f"run the same command with {words}"
    )


def _verify(arguments: Sequence[str]) -> str:
    if len(arguments) != 1:
        raise ConfigError("name one archive, as in farebox records verify records.tar")
    path = typed_values.path("FILE", arguments[0])
    return f"{path}: {_text(verify(path))}; every file matches its digest"


def _text(contents: Contents) -> str:
    sources = "; ".join(contents.sources)
    return f"{contents.answers:,} answers in {contents.files:,} files ({contents.bytes:,} bytes) of {sources}"
