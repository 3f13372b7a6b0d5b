"""Fine-tuning tasks on labeled data. The core imports `base` only, which imports a task when a config names it."""

import m3i_scale.config  # noqa: F401 - its `RunConfig` has a `Task`, so that it must be imported first
