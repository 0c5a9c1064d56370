"""What sets one encoder family apart from another; each family's file fills in one of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastrank.model.settings import Settings


@dataclass(frozen=True)
class Family:
    """One encoder family.

    prefix: what the hub's weight names of the encoder begin with. architecture: the transformers class that opens our
    checkpoints. head: from Settings to a module, (pairs, hidden) -> (pairs, num_labels), with a table `hub_names`.
    plain_head: the same for checkpoints with a linear head only. defaults: of config.json, where they differ from the
    other families'. positions_after_padding: (token_ids, positions, pad_token_id) -> rows of the position table, None
    where these are the positions themselves.
    """

    prefix: str
    architecture: str
    head: type[nn.Module]
    plain_head: type[nn.Module] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positions_after_padding: Callable[[Tensor, Tensor, int], Tensor] | None = None


class DenseHead(nn.Module):
    """The layers of a head with one hidden layer; a family says what lies between them, and the hub's names of both."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.dense = nn.Linear(settings.hidden_size, settings.hidden_size)
        self.output = nn.Linear(settings.hidden_size, settings.num_labels)
        self.dropout = settings.head_dropout
