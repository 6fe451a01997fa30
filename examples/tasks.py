"""asyncio: generations as tasks, which go on together; one is cancelled when enough is known.

python examples/tasks.py [MODEL]
"""

import asyncio
import sys

import ggpy


async def tell(model: ggpy.Model, prompt: str, seed: int) -> str:
    generation = model.generate(prompt, max_tokens=40, temperature=0.8, seed=seed)
    async for piece in generation:
        if "." in piece:  # a sentence is enough
            generation.cancel()
    return prompt + generation.text


async def run(path: str) -> None:
    with ggpy.load(path, n_ctx=1024) as model:
        prompts = ("Then said Jesus", "And the angel of the", "Now there was a man")
        for told in await asyncio.gather(*(tell(model, prompt, seed) for seed, prompt in enumerate(prompts))):
            print(told)


def main(path: str) -> None:
    asyncio.run(run(path))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
