"""Everything that knows a model class: loading, installing a scaling, memory-bounded scoring."""
