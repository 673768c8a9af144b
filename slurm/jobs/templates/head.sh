#!/usr/bin/env bash
# {{ about }}
# By hand, from the folder in which `fledge submit` was started{{ " and after " ~ after if after }}:
#   sbatch {{ file | quote }}
{%- for directive in directives %}
#SBATCH {{ directive }}
{%- endfor %}
set -eo pipefail
jobs=$(realpath {{ folder | quote }}) # of this submission
# Files of this name in this folder tell progress, without which a job starts again only so often:
export artifact={{ artifact | quote }} grows={{ grows | quote }} max_restarts={{ cluster.max_restarts }}
{%- for name in cluster.modules %}
module load {{ name | quote }}
{%- endfor %}
{%- if venv %}
# shellcheck source=/dev/null
source {{ venv | expand }}/bin/activate
{%- endif %}
{%- for line in cluster.setup %}
{{ line }}
{%- endfor %}
{%- for name, value in env.items() %}
export {{ name }}={{ value | expand }}
{%- endfor %}
{%- if cluster.scratch %}
export TMPDIR={{ cluster.scratch | expand }}
{%- endif %}
export PYTHONPATH="$jobs/code${PYTHONPATH:+:$PYTHONPATH}" # the package as it was when it was submitted
set -u
# shellcheck source=/dev/null
source "$jobs/common.sh"
