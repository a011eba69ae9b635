# Long pilots of vanilla on one GPU, in two lanes: bash experiments/majority/long.sh
run() { name=$1; shift; echo "== $name"; timeout 100 python3 experiments/majority/long.py --device cuda --follow 1 --name $name --every 5000 --seconds 58 "$@" 2>&1 | grep -v Warning; }
lane1() {
  run base      --T 32 --B 64 --K 8 --words 16 --steps 25000 --lr 3e-3 --wd 0.0
  run deep      --T 64 --B 64 --K 8 --words 16 --L 8 --I 256 --steps 15000 --lr 2e-3 --wd 0.1
  run copy      --T 64 --B 64 --K 4 --words 16 --L 3 --H 1 --mode copy --steps 30000 --lr 1e-3 --wd 0.0
  run nobos     --T 64 --B 64 --K 8 --words 16 --bos 0 --steps 25000 --lr 1e-3 --wd 0.0
  run narrow    --T 32 --B 64 --K 8 --words 16 --D 32 --I 256 --H 2 --L 6 --steps 20000 --lr 1e-3 --wd 0.0
}
lane2() {
  run slow      --T 32 --B 64 --K 8 --words 16 --steps 25000 --lr 1e-3 --wd 0.0 --I 512
  run decay     --T 32 --B 64 --K 8 --words 16 --steps 25000 --lr 1e-3 --wd 0.3 --I 512
  run long      --T 128 --B 32 --K 8 --words 16 --L 6 --steps 15000 --lr 2e-3 --wd 0.0
  run mlp       --T 32 --B 64 --K 8 --words 16 --steps 25000 --lr 5e-4 --mlp_lr 10 --wd 0.0 --I 512
  run untied    --T 32 --B 64 --K 8 --words 16 --steps 25000 --lr 1e-3 --wd 0.0 --tie 0 --I 512
}
lane1 > ${OUT:-.}/lane1.log & lane2 > ${OUT:-.}/lane2.log & wait
cat ${OUT:-.}/lane1.log ${OUT:-.}/lane2.log
