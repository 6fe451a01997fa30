"""The fields of requests: one table for each API, by which they are checked and described (`openapi`).

Fields that aren't in the table are ignored, since clients send many.
"""

from ..generate.fields import (
    BOOL,
    CHAT,
    COMPLETION,
    CONVERSATION,
    EMBEDDINGS,
    GENERATION,
    OBJECT,
    PROMPT,
    RESPONSES,
    TEXT,
    Field,
    list_of,
    one_of,
    whole,
)

__all__ = ["CHAT", "COMPLETION", "EMBEDDINGS", "RESPONSES"]  # OpenAI's

MESSAGES = {
    **CONVERSATION,
    "system": Field(one_of(TEXT, list_of(OBJECT))),
    "tool_choice": Field(OBJECT),
    "thinking": Field(OBJECT),
}
TOKENIZE = {
    "model": Field(TEXT),
    "content": Field(TEXT),
    "prompt": Field(TEXT),
    "messages": Field(list_of(OBJECT, 1)),
    "tools": Field(list_of(OBJECT)),
    "add_special": Field(BOOL),
    "parse_special": Field(BOOL),
    "with_pieces": Field(BOOL),
    "chat_template_kwargs": Field(OBJECT),
}
NATIVE = {
    **GENERATION,
    "prompt": Field(PROMPT),
    "n_probs": Field(whole(0, 100)),
    "return_tokens": Field(BOOL),
    "post_sampling_probs": Field(BOOL),
    "response_fields": Field(list_of(TEXT)),
}
INFILL = {
    **NATIVE,
    "prompt": Field(TEXT),
    "input_prefix": Field(TEXT),
    "input_suffix": Field(TEXT),
    "input_extra": Field(list_of(OBJECT)),
}
RERANK = {
    "model": Field(TEXT),
    "query": Field(TEXT),
    "documents": Field(list_of(one_of(TEXT, OBJECT), 1)),
    "texts": Field(list_of(TEXT, 1)),
    "top_n": Field(whole(1)),
    "return_documents": Field(BOOL),
    "return_text": Field(BOOL),
}
DETOKENIZE = {"model": Field(TEXT), "tokens": Field(list_of(whole(0)))}
