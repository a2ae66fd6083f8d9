"""The one-layer attention models."""

from models.attention.heads import AttentionHead as AttentionHead
from models.attention.heads import AttentionStack as AttentionStack
from models.attention.heads import Feedforward as Feedforward
from models.attention.heads import diagonal_head as diagonal_head
from models.attention.heads import diagonal_head_loss as diagonal_head_loss
from models.attention.heads import diagonal_stack as diagonal_stack
from models.attention.heads import observe_products as observe_products
from models.attention.heads import product_coordinates as product_coordinates
from models.attention.heads import split_products as split_products
from models.attention.joma import JomaBlock as JomaBlock
from models.attention.joma import JomaInputs as JomaInputs
from models.attention.joma import JomaState as JomaState
from models.attention.joma import joma_observer as joma_observer
from models.attention.products import head_products as head_products
from models.attention.products import thin_products as thin_products
from models.attention.prompt import PromptAttention as PromptAttention
from models.attention.prompt import attention_function as attention_function
from models.attention.prompt import attention_log_ratio as attention_log_ratio
from models.attention.prompt import attention_logits as attention_logits
from models.attention.prompt import log_mean_ratio as log_mean_ratio
from models.attention.prompt import prompt_attention as prompt_attention
from models.attention.scan_snap import ScanSnapAttention as ScanSnapAttention
from models.attention.scan_snap import observe_weights as observe_weights
from models.attention.scan_snap import population_loss as population_loss
