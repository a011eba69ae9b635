"""Models with a head for another task than predicting the next token.

The heads are transformers' own: each builds its base model with `AutoModel`, which gives ours.
"""

from __future__ import annotations

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.pretrained import OasisPreTrainedModel


class OasisForSequenceClassification(GenericForSequenceClassification, OasisPreTrainedModel):
    """A label for each sequence, read off its last token that is not padding."""


class OasisForTokenClassification(GenericForTokenClassification, OasisPreTrainedModel):
    """A label for each token."""


class OasisForQuestionAnswering(GenericForQuestionAnswering, OasisPreTrainedModel):
    """The first and the last token of an answer inside the input."""


AutoModelForSequenceClassification.register(OasisConfig, OasisForSequenceClassification)
AutoModelForTokenClassification.register(OasisConfig, OasisForTokenClassification)
AutoModelForQuestionAnswering.register(OasisConfig, OasisForQuestionAnswering)
