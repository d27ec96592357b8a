"""transformers models: loading, applying a scaling, scoring long texts, generating, saving."""

from longrope.transformers_version import require_known_transformers

require_known_transformers()
