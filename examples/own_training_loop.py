"""A training loop of your own: one prompt, four answers, ranked; the loss of the list without logits.

python examples/own_training_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from larpo_kernels import fused_linear_listwise_loss, linear_sequence_logps

PROMPT = "the cat sat on"
ANSWERS = [" the mat", " a red house", " one two", " bad film"]  # the best first
REWARDS = [2.0, 1.0, 0.5, 0.0]  # higher is better; only the order matters to most objectives
IGNORE = -100


def rows_of(tokenizer, prompt: str, answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> input_ids and labels [answers, tokens]: labels are shifted, and prompt and padding are ignored."""
    head = tokenizer(prompt)["input_ids"]
    rows = [head + tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row[1:] + [IGNORE] * (longest - len(row) + 1) for row in rows])
    labels[:, : len(head) - 1] = IGNORE
    return ids, labels


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    asked = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(asked.model).to(device)
    ids, labels = (x.to(device) for x in rows_of(AutoTokenizer.from_pretrained(asked.model), PROMPT, ANSWERS))
    rewards = torch.tensor(REWARDS, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate)

    def hidden():
        return model.base_model(ids).last_hidden_state  # what the lm_head would turn into logits

    with torch.no_grad():  # the reference policy is the model before training
        ref_logps = linear_sequence_logps(hidden(), model.lm_head.weight, labels)
    losses = []
    for step in range(asked.steps):
        out = fused_linear_listwise_loss(
            hidden(), model.lm_head.weight, labels, rewards, list_sizes=4, objective="listmle", ref_logps=ref_logps, beta=0.1
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}, implicit rewards {[round(x, 3) for x in out.scores.tolist()]}")
    return losses


if __name__ == "__main__":
    main()
