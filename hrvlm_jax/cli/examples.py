"""One example of every verb, shown at the end of its `--help`."""

EXAMPLES = {
  'train': 'hrvlm train --config configs/tiny/pheye.py --workdir runs/pheye',
  'finetune': 'hrvlm finetune runs/quickstart/checkpoint --data own.json --lora 16 --out runs/mine',
  'sweep': 'hrvlm sweep --config run.py --config.seed=0,1,2 --out runs/seeds',
  'ask': 'hrvlm ask --checkpoint runs/quickstart/checkpoint photo.png "What does the sign say?"',
  'chat': 'hrvlm chat --checkpoint runs/quickstart/checkpoint photo.png',
  'encode': 'hrvlm encode --checkpoint runs/ps3 photo.png --prompt "the sign" --overlay map.png',
  'eval': 'hrvlm eval --checkpoint runs/mine --benchmark textvqa,pope --data benchmarks --out '
          'runs/scores',
  'analyse': 'hrvlm analyse sizes --help',
  'compare': 'hrvlm compare --config configs/compare/needle_tiny.py --out runs/compare',
  'export': 'hrvlm export --checkpoint runs/mine --to runs/mine_exported',
  'push': 'hrvlm push runs/mine_exported user/name',
  'convert': 'hrvlm convert --from visheratin/MC-LLaVA-3b --to weights/mc_llava_3b',
  'quickstart': 'hrvlm quickstart --out runs/quickstart',
  'tiny': 'hrvlm tiny --config configs/tiny/pheye.py',
  'data check': 'hrvlm data check own.json --images pictures',
  'data show': 'hrvlm data show --config run.py --out show.png',
  'data build': 'hrvlm data build own.json --out shards',
  'curate': 'hrvlm curate photographs --out regions',
  'needle': 'hrvlm needle --out runs/needle',
  'plan': 'hrvlm plan --config configs/pheye.py --topology v5e:16x16',
  'bench': 'hrvlm bench ps3_4k',
  'params': 'hrvlm params --config configs/tiny/pheye.py',
  'doctor': 'hrvlm doctor',
  'completion': 'source <(hrvlm completion bash)',
}
