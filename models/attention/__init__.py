"""The one-layer attention models."""

from models.attention.functional import Frozen as Frozen
from models.attention.functional import as_function as as_function
from models.attention.functional import gauss_newton_spectrum as gauss_newton_spectrum
from models.attention.joma import JomaBlock as JomaBlock
from models.attention.joma import JomaInputs as JomaInputs
from models.attention.joma import JomaState as JomaState
from models.attention.joma import joma_observer as joma_observer
from models.attention.products import head_products as head_products
from models.attention.prompt import PromptAttention as PromptAttention
from models.attention.prompt import attention_function as attention_function
from models.attention.prompt import attention_log_ratio as attention_log_ratio
from models.attention.prompt import attention_logits as attention_logits
from models.attention.prompt import log_mean_ratio as log_mean_ratio
from models.attention.prompt import prompt_attention as prompt_attention
from models.attention.scan_snap import ScanSnapAttention as ScanSnapAttention
from models.attention.scan_snap import observe_weights as observe_weights
