.PHONY: test lint bench tables figures page lines

test:            ## the fast tests, three minutes on two cores; pytest -m '' runs the slow ones too
	pytest -q

lint:
	ruff check .

bench:           ## speed against others, FLOPs of everything; lines for results/bench.jsonl
	python bench.py count
	python bench.py compare --record out/bench.jsonl
	python bench.py sample out/digits --record out/bench.jsonl
	python bench.py fid --record out/bench.jsonl

tables:          ## rewrites the tables of README.md from results/*.jsonl
	python results/tables.py

figures:         ## every picture of README.md and docs, from the code; trains the digits first if they are not there
	python docs/figures.py

page:            ## docs/index.html from README.md and the sources
	python docs/page.py

lines:           ## the reading path is a promise: under 1,200 lines together
	@wc -l pyramid.py schedule.py model.py train.py sample.py
