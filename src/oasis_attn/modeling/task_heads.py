"""Models with a head for classification or question answering.

The heads are those of transformers, which build their base model with `AutoModel`; for an
`OasisConfig` this is an OASIS model.
"""

from __future__ import annotations

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.hf_compat import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from oasis_attn.modeling.pretrained import OasisPreTrainedModel


class OasisForSequenceClassification(GenericForSequenceClassification, OasisPreTrainedModel):
    """Predicts a label for each sequence from its last token that is not padding."""


class OasisForTokenClassification(GenericForTokenClassification, OasisPreTrainedModel):
    """Predicts a label for each token."""


class OasisForQuestionAnswering(GenericForQuestionAnswering, OasisPreTrainedModel):
    """Predicts the first and the last token of an answer in the input."""


AutoModelForSequenceClassification.register(OasisConfig, OasisForSequenceClassification)
AutoModelForTokenClassification.register(OasisConfig, OasisForTokenClassification)
AutoModelForQuestionAnswering.register(OasisConfig, OasisForQuestionAnswering)
