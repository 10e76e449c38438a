"""Language models: any causal LM of transformers with its tokenizer and chat format, configured by YAML."""

from prism_deco.llms.base import LanguageModel
from prism_deco.llms.build import build_llm
from prism_deco.llms.encoding import Encoded, truncate
from prism_deco.llms.prompts import Message, Segment
from prism_deco.llms.spec import LLMSpec

__all__ = ["Encoded", "LLMSpec", "LanguageModel", "Message", "Segment", "build_llm", "truncate"]
