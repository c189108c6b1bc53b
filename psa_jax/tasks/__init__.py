"""The tasks: a file each, of the shape in `base`, known to `registry` by name.

Each line of imports adds a task.
"""

from psa_jax import extras

# First of all: the data that tasks read would ask for its own extra only.
extras.require('tasks')

from psa_jax.tasks.base import Data as Data
from psa_jax.tasks.base import Generator as Generator
from psa_jax.tasks.base import Loss as Loss
from psa_jax.tasks.base import Metric as Metric
from psa_jax.tasks.base import Stage as Stage
from psa_jax.tasks.base import Task as Task
from psa_jax.tasks.base import auxiliary as auxiliary
from psa_jax.tasks.classification import (
  TextClassification as TextClassification,
)
from psa_jax.tasks.image_classification import (
  ImageClassification as ImageClassification,
)
from psa_jax.tasks.language_modeling import LanguageModel as LanguageModel
from psa_jax.tasks.recall import Recall as Recall
from psa_jax.tasks.registry import TaskSpec as TaskSpec
from psa_jax.tasks.registry import check as check
from psa_jax.tasks.registry import get as get
from psa_jax.tasks.registry import load_data as load_data
from psa_jax.tasks.registry import make_task as make_task
from psa_jax.tasks.registry import metrics as metrics
from psa_jax.tasks.registry import names as names
from psa_jax.tasks.registry import register as register
from psa_jax.tasks.tagging import Tagging as Tagging
from psa_jax.tasks.translation import Translation as Translation
