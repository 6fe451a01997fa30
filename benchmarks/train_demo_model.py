"""Train the small mixture-of-experts model that ships inside ggpy, on the King James Bible.

::

    apt-get install bible-kjv bible-kjv-text
    OMP_WAIT_POLICY=PASSIVE python benchmarks/train_demo_model.py OUT --minutes 33 --threads 2

Needs torch and transformers. OUT gets a Hugging Face checkpoint of DeepSeek-V2's architecture with a tokenizer of
bytes, in bfloat16: the state of the lowest held-out loss so far, written anew at each measurement. Three books are
never trained on. Steps are bounded by time: the learning rate follows the clock, so that a slower machine ends with
fewer steps and a finished schedule. Products are taken in bfloat16 (fast where the processor has instructions for it),
weights and their updates are float32. The log has the figures of the model's card. Where other programs run too,
OMP_WAIT_POLICY=PASSIVE keeps a thread that waits for the other from taking its core: up to ten times as fast.
"""

import argparse
import json
import math
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

END = "<|endoftext|>"  # before every text and between chapters
END_ID = 0
HELD_OUT_BOOKS = ("Ruth", "Jonah", "Phi")  # as `bible` abbreviates them; Phi is Philippians
TOKENS_PER_STEP = 4096
# Windows are short while the model learns words, then as long as the model's context: (share of the time, tokens).
STAGES = ((0.75, 256), (1.0, 1024))
PEAK_RATE = 2.5e-3
FINAL_RATE = 0.05  # of the peak
WARM_UP = 0.02  # share of the time
BALANCE = 0.01  # weight of the load-balancing loss
SEED = 1611
MEASURE_EVERY = 120  # seconds
SAMPLE_PROMPTS = ("", "And it came to pass", "The LORD is my", "In the beginning")

# As DeepSeek-V2-Lite's config.json, at a 3500th of its size.
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": BALANCE,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.04,
    "intermediate_size": 768,
    "kv_lora_rank": 64,
    "max_position_embeddings": 1024,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 96,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 2048,
}
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": END,
    # No dialogue: what was said stands line by line, and the model goes on with the last line.
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "clean_up_tokenization_spaces": False,
    "eos_token": END,
    "model_max_length": CONFIG["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION_CONFIG = {"bos_token_id": END_ID, "eos_token_id": END_ID, "do_sample": True, "temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True)
class Loss:
    """What a text costs: nats in all, and what they are shared by."""

    nats: float
    n_tokens: int
    n_bytes: int

    def __str__(self) -> str:
        per_token, per_byte = self.nats / self.n_tokens, self.nats / self.n_bytes
        return (
            f"{per_token:.4f} nats per token (perplexity {math.exp(per_token):.2f}), "
            f"{per_byte / math.log(2):.4f} bits per byte, {self.n_tokens} tokens, {self.n_bytes} bytes"
        )


def read_books() -> dict[str, list[list[str]]]:
    """Book -> chapters -> verses, in the order of the Bible."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    books: dict[str, list[list[str]]] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        book, chapter, verse, text = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line).groups()
        chapters = books.setdefault(book, [])
        if int(verse) == 1:
            chapters.append([])
        chapters[int(chapter) - 1].append(text)
    return books


def chapter_text(verses: list[str]) -> str:
    return "".join(f"{verse}\n" for verse in verses)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE that splits as GPT-2's and puts END before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, END_ID)]
    )
    return tokenizer


class Windows:
    """Random windows of a text's tokens: END, then the text from the start of some verse on."""

    def __init__(self, tokenizer: Tokenizer, chapters: list[list[str]], seed: int):
        ids, starts = [], []
        for verses in chapters:
            for verse in verses:
                starts.append(len(ids))
                ids += tokenizer.encode(f"{verse}\n", add_special_tokens=False).ids
            ids.append(END_ID)
        self.ids, self.starts = torch.tensor(ids), torch.tensor(starts)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, n_windows: int, length: int) -> torch.Tensor:
        """int64 (n_windows, length + 1)."""
        possible = self.starts[self.starts <= len(self.ids) - length]
        starts = possible[torch.randint(len(possible), (n_windows,), generator=self.generator)]
        windows = self.ids[starts[:, None] + torch.arange(length)]
        return functional.pad(windows, (1, 0), value=END_ID)


def balance_loss(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean over layers of n_experts · Σ share of choices · mean probability: 1 where all is even (Fedus et al. 2021)."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        losses.append(logits.shape[-1] * (choices(logits) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def choices(router_logits: torch.Tensor) -> torch.Tensor:
    """Share of the routed choices that each expert gets: (n_tokens, n_experts) -> (n_experts,), sums to 1."""
    n_experts = router_logits.shape[-1]
    chosen = router_logits.topk(CONFIG["num_experts_per_tok"], -1).indices
    return torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()


@torch.no_grad()
def measure(
    model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, chapters: list[list[str]]
) -> tuple[Loss, list[torch.Tensor]]:
    """Loss over chapters, each a document of its own with its END, and the share of choices per layer and expert.

    What exceeds the context is read in a new window after END.
    """
    model.eval()
    context = CONFIG["max_position_embeddings"]
    nats, n_tokens, routers = 0.0, 0, []
    for verses in chapters:
        ids = [*tokenizer.encode(chapter_text(verses), add_special_tokens=False).ids, END_ID]
        for start in range(0, len(ids), context - 1):
            window = torch.tensor([[END_ID, *ids[start : start + context - 1]]])
            output = model(window[:, :-1], output_router_logits=True, use_cache=False)
            nats += functional.cross_entropy(output.logits[0].float(), window[0, 1:], reduction="sum").item()
            n_tokens += window.shape[1] - 1
            routers.append(output.router_logits)
    model.train()
    loss = Loss(nats, n_tokens, sum(len(chapter_text(verses).encode()) for verses in chapters))
    return loss, [choices(torch.cat(layer)) for layer in zip(*routers, strict=True)]


@torch.no_grad()
def complete(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, prompt: str, n_tokens: int, sample: bool) -> str:
    model.eval()
    torch.manual_seed(SEED)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    options = {"temperature": 0.8, "top_p": 0.95, "top_k": 0} if sample else {}
    output = model.generate(
        ids, max_new_tokens=n_tokens, do_sample=sample, attention_mask=torch.ones_like(ids), pad_token_id=END_ID, **options
    )
    model.train()
    return tokenizer.decode(output[0].tolist())


def new_model() -> DeepseekV2ForCausalLM:
    torch.manual_seed(SEED)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})).float()
    model.set_experts_implementation("grouped_mm")  # one product for all experts: several times as fast as one each
    # What adds to the residual stream starts smaller, by the number of additions (GPT-2).
    scale = (2 * CONFIG["num_hidden_layers"]) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(scale)
    return model


def checkpoint_tensors(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in bfloat16 under the names of DeepSeek's own checkpoints, one tensor per expert and matrix."""
    tensors = {}
    for name, weight in model.state_dict().items():
        weight = weight.to(torch.bfloat16)
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = weight.contiguous()
            continue
        stem, _, kind = name.rpartition(".")
        for i, expert in enumerate(weight):
            parts = (
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if kind == "gate_up_proj" else [(kind, expert)]
            )
            for part, matrix in parts:
                tensors[f"{stem}.{i}.{part}.weight"] = matrix.contiguous()
    return tensors


def write_checkpoint(out: Path, model: DeepseekV2ForCausalLM, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def rate(progress: float) -> float:
    """Learning rate at a share of the time: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return PEAK_RATE * (progress + 1e-3) / WARM_UP
    falling = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return PEAK_RATE * (FINAL_RATE + (1 - FINAL_RATE) * falling)


def report(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, held_out: dict[str, list[list[str]]]) -> None:
    """Print the figures of the card and sample texts."""
    everything = [chapter for chapters in held_out.values() for chapter in chapters]
    for name, chapters in {**held_out, "all held-out books": everything}.items():
        loss, shares = measure(model, tokenizer, chapters)
        print(f"{name}: {loss}")
    for i, layer in enumerate(shares, CONFIG["first_k_dense_replace"]):
        variation = (layer.std(correction=0) / layer.mean()).item()
        print(f"layer {i}: {' '.join(f'{100 * share:.1f}' for share in layer)} % of choices; variation {variation:.3f}")
    for sample in (False, True):
        for prompt in SAMPLE_PROMPTS:
            print(f"--- {'sampled' if sample else 'greedy'}: {prompt!r}")
            print(complete(model, tokenizer, prompt, 120, sample))


def train(out: Path, minutes: float) -> None:
    books = read_books()
    held_out = {name: books.pop(name) for name in HELD_OUT_BOOKS}
    chapters = [chapter for book in books.values() for chapter in book]
    tokenizer = train_tokenizer([chapter_text(verses) for verses in chapters])
    windows = Windows(tokenizer, chapters, SEED)
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text("".join(map(chapter_text, held_out["Ruth"])))

    model = new_model()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    n_weights = sum(weight.numel() for weight in model.parameters())
    print(f"{n_weights} weights, {len(windows.ids)} tokens in {len(chapters)} chapters to train on", flush=True)

    start = time.monotonic()
    last_measured, step, best = start, 0, math.inf
    mean_loss = mean_balance = 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = next(length for end, length in STAGES if progress < end)
        batch = windows.draw(TOKENS_PER_STEP // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(progress)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep = 1 - 1 / min(step, 50)
        mean_loss = keep * mean_loss + (1 - keep) * loss.item()
        mean_balance = keep * mean_balance + (1 - keep) * balance.item()

        if time.monotonic() - last_measured > MEASURE_EVERY:
            last_measured = time.monotonic()
            best = keep_best(out, model, tokenizer, held_out, best)
            print(
                f"{(last_measured - start) / 60:.1f} min, step {step}, {step * TOKENS_PER_STEP} tokens, window {length}: "
                f"training {mean_loss:.4f}, balance {mean_balance:.3f}, best held-out {best:.4f}",
                flush=True,
            )
    best = keep_best(out, model, tokenizer, held_out, best)
    print(f"{step} steps, {step * TOKENS_PER_STEP} tokens in {(time.monotonic() - start) / 60:.1f} min")


def keep_best(out: Path, model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, held_out: dict, best: float) -> float:
    """Write the model where it is better than `best`, in nats per held-out token; the better of both."""
    loss, _ = measure(model, tokenizer, [chapter for chapters in held_out.values() for chapter in chapters])
    now = loss.nats / loss.n_tokens
    print(f"held-out {now:.4f}", flush=True)
    if now < best:
        write_checkpoint(out, model, tokenizer)
    return min(now, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=33.0, help="time to train for; 0 only reports on OUT")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.minutes > 0:
        train(options.out, options.minutes)
    books = read_books()
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    model = DeepseekV2ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    report(model, tokenizer, {name: books[name] for name in HELD_OUT_BOOKS})


if __name__ == "__main__":
    main()
