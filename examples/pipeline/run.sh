#!/usr/bin/env bash
# sft -> rm -> sample -> score -> rso -> dpo, and sft -> rm -> ppo, of a tiny model on a CPU, in minutes.
# From the repository's root, in an environment that has fastpo:  examples/pipeline/run.sh [OUTPUT_DIR [SCALE]]
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # for so small a model, threads that wait for one another cost more than they do
out=${1:-runs/pipeline}
here=$(dirname "$0")
if [ -e "$out" ]; then
    echo "$out is there already: delete it, or name another folder" >&2
    exit 1
fi

python "$here/make_data.py" "$out/data" "${2:-1}"

# 1. A model that speaks, and two models of what people prefer.
fastpo train "$here/sft.yaml" --dataset "$out/data/responses.jsonl" --output_dir "$out/sft"
rm=("$here/rm.yaml" --model_name_or_path "$out/sft"
    --dataset "$out/data/preferences.jsonl" --eval_dataset "$out/data/held_out.jsonl")
fastpo train "${rm[@]}" --output_dir "$out/rm"
fastpo train "${rm[@]}" --output_dir "$out/rm_disco" --add_disco_head true --pref_loss_type disco \
    --disco_prior_weight 0.1

# 2. Preferences as people gave them.
dpo=("$here/dpo.yaml" --model_name_or_path "$out/sft")
fastpo train "${dpo[@]}" --dataset "$out/data/preferences.jsonl" --output_dir "$out/dpo"

# 3. Preferences of the model's own responses, by rejection sampling.
fastpo sample --model_name_or_path "$out/sft" --dataset "$out/data/prompts.jsonl" --output_file "$out/candidates.jsonl" \
    --num_generations 16 --max_completion_length 48 --batch_size 16
fastpo score --reward_model "$out/rm" --dataset "$out/candidates.jsonl" --output_file "$out/scored.jsonl"
fastpo rso --dataset "$out/scored.jsonl" --output_file "$out/rso_pairs.jsonl" --beta 0.5
fastpo train "${dpo[@]}" --dataset "$out/rso_pairs.jsonl" --output_dir "$out/rso_dpo" --num_train_epochs 3

# 4. On-policy, against the scalar rewards and against the Gaussian ones, which are sure of some and not of others.
ppo=("$here/ppo.yaml" --model_name_or_path "$out/sft" --dataset "$out/data/prompts.jsonl")
fastpo train "${ppo[@]}" --reward_model "$out/rm" --output_dir "$out/ppo"
fastpo train "${ppo[@]}" --reward_model "$out/rm_disco" --risk_aversion 0.5 --output_dir "$out/ppo_disco"

# 5. What it came to, on held-out prompts, by the true reward that no model has seen.
for model in sft dpo rso_dpo ppo ppo_disco; do
    fastpo sample --model_name_or_path "$out/$model" --dataset "$out/data/held_out_prompts.jsonl" \
        --output_file "$out/held_out/$model.jsonl" --num_generations 4 --max_completion_length 48 --batch_size 64
    fastpo score --reward_funcs fastpo.planted_rewards:true_reward --dataset "$out/held_out/$model.jsonl" \
        --output_file "$out/held_out/$model.true.jsonl"
done
# The closed form of the same, without training: the best of sft's responses by the reward model.
fastpo score --reward_model "$out/rm" --dataset "$out/held_out/sft.jsonl" --output_file "$out/held_out/sft.rm.jsonl"
fastpo rerank --dataset "$out/held_out/sft.rm.jsonl" --output_file "$out/held_out/best_of_4.jsonl" --beta 0.5
fastpo score --reward_funcs fastpo.planted_rewards:true_reward --dataset "$out/held_out/best_of_4.jsonl" \
    --output_file "$out/held_out/best_of_4.true.jsonl"
python "$here/picture.py" "$out"
