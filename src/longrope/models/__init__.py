"""transformers models: loading, applying a scaling, scoring long texts, generating, saving."""
