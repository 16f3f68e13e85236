#!/bin/sh
# Compile, check, measure, compare with a threshold: all that stands between a trained model and a shipped file.
# Needs jq, and a recipe: $RECIPE, or recipe.yaml in the current folder.
#   MODEL=model.pt2 CALIB=images/ VAL=val/ MOST_DROP=1.0 sh pipeline.sh build
# Exit codes: those of repquant-fx (2 bad input, 3 the file disagrees with the FX reference, 1 a bug), and 4 where accuracy is too low.
set -eu

out=${1:?"usage: pipeline.sh OUT_FOLDER"}
mkdir -p "$out"

# stdout is one JSON object, stderr one JSON event per line: both can be kept
repquant-fx compile "$MODEL" --out "$out/model.onnx" --report "$out/report.json" --calib "$CALIB" --recipe "${RECIPE:-recipe.yaml}" \
    --json --log-json > "$out/compile.json" 2> "$out/compile.log" || {
    code=$?
    jq -r 'select(.event == "error").message' "$out/compile.log" >&2
    exit "$code"
}

# a warning is no failure, but somebody should read it
jq -r 'select(.event == "warning").message' "$out/compile.log" >&2
if jq -e '.calibration.synthetic' "$out/compile.json" > /dev/null; then
    echo "calibrated on made-up data" >&2
    exit 2
fi
jq -r '.left_alone[] | "left alone: \(.path): \(.reason)"' "$out/compile.json" >&2

repquant-fx evaluate "$MODEL" --data "$VAL" --quiet --json > "$out/float.json"
repquant-fx evaluate "$out/model.onnx" --data "$VAL" --quiet --json > "$out/quantized.json"

jq -n --slurpfile float "$out/float.json" --slurpfile quantized "$out/quantized.json" --slurpfile compiled "$out/compile.json" \
    '{float: $float[0].top1, quantized: $quantized[0].top1, drop: ($float[0].top1 - $quantized[0].top1),
      output_sqnr_db: $compiled[0].output_sqnr_db, megabytes: ($compiled[0].file_bytes / 1e6)}' > "$out/summary.json"
cat "$out/summary.json"
if ! jq -e --argjson most "${MOST_DROP:-1.0}" '.drop <= $most' "$out/summary.json" > /dev/null; then
    echo "accuracy drops by more than ${MOST_DROP:-1.0} points" >&2
    exit 4
fi
