"""`kontext train --dry-run`: everything that can fail later is tried now, and what the run will take is shown."""

import shutil
from collections import Counter
from collections.abc import Sequence

import torch

from kontext import console
from kontext.checkpoints import empty_transformer, load_clip_tokenizer, load_t5_tokenizer
from kontext.commands import train_average, train_model, train_needs
from kontext.commands import train_values as values
from kontext.commands.memory_table import show_memory
from kontext.commands.model_sizes import PictureModels, picture_models
from kontext.data.batches import Batches
from kontext.data.cache import read_header
from kontext.data.config import load_datasets
from kontext.data.plan import identity
from kontext.errors import UserError
from kontext.generation.request import Request
from kontext.model.latents import PATCH
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.options.train import Train
from kontext.training.forecast import Forecast, Sizes, forecast
from kontext.training.names import Names
from kontext.training.network import Network
from kontext.training.plan import Plan
from kontext.training.prompts import read_sample_prompts
from kontext.training.session import Start
from kontext.training.state import check_network
from kontext.training.trained import Trained
from kontext.training.validation import Held
