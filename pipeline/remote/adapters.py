"""All adapters by name. `cards.HTTP_GRANTS` has the greatest access that each can give."""

from __future__ import annotations

from pipeline.cards import ModelCard
from pipeline.remote.adapter import Adapter
from pipeline.remote.farebox import FareboxAdapter
from pipeline.remote.hf_zero_shot import HuggingFaceZeroShot
from pipeline.remote.jina_classify import JinaClassifier
from pipeline.remote.oip_v2 import OpenInference
from pipeline.remote.openai_embeddings import OpenAIEmbeddings

ADAPTERS: dict[str, type[Adapter]] = {
    "farebox": FareboxAdapter,
    "hf_zero_shot": HuggingFaceZeroShot,
    "jina_classify": JinaClassifier,
    "oip_v2": OpenInference,
    "openai_embeddings": OpenAIEmbeddings,
}


def adapter_of(card: ModelCard) -> Adapter:
    """Return the adapter of a card of kind http."""
    assert card.http is not None
    return ADAPTERS[card.http.adapter](card)
