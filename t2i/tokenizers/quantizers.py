"""All kinds of bottlenecks that have codes."""

from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.lookup_free import LookupFreeConfig

QuantizerConfig = CodebookConfig | FiniteScalarConfig | GumbelConfig | LookupFreeConfig
"""Each says its `size`, the `width` of a code's vector, and how many channels it `takes`."""
