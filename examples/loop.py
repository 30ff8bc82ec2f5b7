"""PPO++ with a scripted guide, on one page: ``python examples/loop.py``.

The task: continue a number by counting up, then end (prompt 3 -> response 4 5 6 EOS). The guide knows how; the
policy is a randomly initialised GPT-2 with 8 tokens. In PPO++ the guide begins some of the responses (the roll-in),
the policy finishes them (the roll-out), and only the policy's tokens are learned. The functions of the math are those
that ``rlgf train`` uses. Shapes: B episodes, T response tokens, V vocabulary, H hidden units.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlgf_cli.functional import kl, losses, masks
from rlgf_cli.functional.advantages import gae, whiten
from rlgf_cli.functional.logprobs import chosen_logprobs

B, T, V, H, EOS = 64, 4, 8, 32, 0


def guide(prompts: torch.Tensor) -> torch.Tensor:
    """The guide's responses: count up from the prompt, then EOS. prompts [B, 1] -> [B, T]"""
    numbers = prompts + torch.arange(1, T)
    return torch.cat([numbers, torch.full((len(prompts), 1), EOS)], dim=1)


def reward(prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Share of the response's positions that are right. prompts [B, 1], responses [B, T] -> [B]"""
    return (responses == guide(prompts)).float().mean(-1)


def train(iterations: int = 40, rollin_prob: float = 0.5, kl_coef: float = 0.002, seed: int = 0) -> list[float]:
    """Train; returns the mean score of the responses without a roll-in, per iteration."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V, n_positions=T + 1, n_embd=H, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    policy, value_head = GPT2LMHeadModel(config), torch.nn.Linear(H, 1)
    ref_model = deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam([*policy.parameters(), *value_head.parameters()], lr=5e-3)

    def forward(model: GPT2LMHeadModel, prompts: torch.Tensor, responses: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities [B, T] of the response tokens, and the hidden states [B, T, H] before them."""
        hidden = model.transformer(torch.cat([prompts, responses[:, :-1]], dim=1)).last_hidden_state
        logits = model.lm_head(hidden)  # [B, T, V]
        return chosen_logprobs(logits.flatten(0, 1), responses.flatten()).view_as(responses), hidden

    scores_of_policy = []
    for iteration in range(iterations):
        # 1. rollout: the guide writes the tokens before the cut, the policy samples the others
        prompts = torch.randint(1, V - T + 1, (B, 1))
        guided = torch.rand(B) < rollin_prob
        cuts = torch.where(guided, torch.randint(1, T, (B,)), 0)  # k uniform on 1..T-1, 0 without a roll-in
        responses, ended = guide(prompts), torch.zeros(B, dtype=torch.bool)
        for t in range(T):
            with torch.no_grad():
                logits = policy(torch.cat([prompts, responses[:, :t]], dim=1)).logits[:, -1]  # [B, V]
            sampled = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
            tokens = torch.where(t < cuts, responses[:, t], sampled)
            responses[:, t] = torch.where(ended, EOS, tokens)
            ended = ended | (responses[:, t] == EOS)
        lengths = ((responses != EOS).sum(-1) + 1).clamp_max(T)  # EOS is part of the response

        # 2. masks: what is a response token, and which of those the policy wrote
        real = masks.response_mask(lengths, T)
        authors = torch.where(torch.arange(T) < cuts.unsqueeze(-1), masks.GUIDE, masks.POLICY)
        learned = masks.author_mask(authors, real, masks.POLICY)

        # 3. log-probabilities and values before the update, then rewards and advantages
        with torch.no_grad():
            old_logprobs, hidden = forward(policy, prompts, responses)
            ref_logprobs, _ = forward(ref_model, prompts, responses)
            old_values = value_head(hidden).squeeze(-1)  # V(s_t), before token t
        scores = reward(prompts, responses)
        log_ratio = kl.log_ratio(old_logprobs, ref_logprobs, learned)
        rewards = kl.token_rewards(scores, log_ratio, masks.last_token(lengths, T), kl_coef)
        lambdas = torch.where(learned, 0.95, 1.0)
        advantages, returns = gae(rewards, old_values, real, 1.0, lambdas)
        advantages = whiten(advantages, learned)

        # 4. update: PPO's clipped loss on the policy's tokens, the value loss on all tokens from the cut on
        for _epoch in range(4):
            for rows in torch.randperm(B).split(B // 2):
                logprobs, hidden = forward(policy, prompts[rows], responses[rows])
                mask = learned[rows]
                policy_loss, _ = losses.policy_loss(
                    logprobs, old_logprobs[rows], advantages[rows], mask, 0.2, mask.sum()
                )
                value_loss = losses.value_loss(
                    value_head(hidden).squeeze(-1), old_values[rows], returns[rows], mask, 0.2, mask.sum()
                )
                optimizer.zero_grad()
                (policy_loss + 0.5 * value_loss).backward()
                optimizer.step()

        scores_of_policy.append(float(scores[~guided].mean()))
        print(
            f"iteration {iteration + 1:3d}  score {scores_of_policy[-1]:.3f}  kl {float(log_ratio.sum(-1).mean()):.3f}"
        )
    return scores_of_policy


if __name__ == "__main__":
    train()
