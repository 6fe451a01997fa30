"""What a model would say after each of its layers ("logit lens", nostalgebraist 2020).

python examples/logit_lens.py [MODEL]
"""

import sys

import numpy as np

import ggpy


def main(path: str) -> None:
    prompt = "And it came to pass in those days, that"
    with ggpy.load(path, n_ctx=256) as model:
        ids = model.tokenizer.encode_prompt(prompt)
        states = model.hidden_states(ids)[:, -1]  # (n_layer + 1, n_embd), of the last token
        norm = model.file.tensors["output_norm.weight"].dequantize()
        output = model.file.tensors.get("output.weight") or model.file.tensors["token_embd.weight"]
        matrix = output.dequantize()  # (n_vocab, n_embd)
        print(prompt)
        for i, x in enumerate(states):
            last = i == len(states) - 1  # has gone through the final norm
            y = x if last else x / np.sqrt(np.mean(x**2) + 1e-6) * norm
            best = np.argsort(matrix @ y)[::-1][:5]
            print(f"  {'at the end' if last else f'before layer {i}':<16}", *(repr(model.detokenize([t])) for t in best))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
