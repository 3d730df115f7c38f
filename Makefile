.PHONY: test lint bench gpu tables figures notebook page lines

test:            ## the fast tests, on two cores; pytest -n 2 -m '' runs the slow ones too
	pytest -q -n 2

lint:
	ruff check .

bench:           ## speed against others; lines for results/bench.jsonl
	python -m studies.bench compare --record out/bench.jsonl

gpu:             ## on a GPU, ten minutes: lines for results/gpu.jsonl
	python -m studies.bench gpu --out out/gpu

tables:          ## rewrites the tables of README.md and docs/*.md from results/*.jsonl
	python -m studies.tables

figures:         ## every picture of README.md and docs, from the code; trains the digits first if they are not there
	python -m docs.figures

notebook:        ## docs/lapflow.ipynb from the sources, with its pictures; trains the digits
	python -m docs.notebook

page:            ## docs/index.html from README.md and the sources
	python -m docs.page

lines:           ## the reading path is a promise: at most 1,000 lines together
	@wc -l pyramid.py schedule.py model.py train.py sample.py
	@test $$(cat pyramid.py schedule.py model.py train.py sample.py | wc -l) -le 1000
