#!/usr/bin/env bash
# {{ "The verifier's servers of " ~ config.name if stage == "server" else "Stage " ~ stage ~ " of run " ~ config.name }}.
# By hand, from the folder in which `fledge submit` was started
{%- if before %} and after {{ before }} {{ "has begun" if before == "server" else "has ended well" }}{% endif %}:
#   sbatch {{ file | quote }}
#SBATCH --job-name={{ (config.name ~ "-" ~ stage) | slurm }}
#SBATCH --output={{ (((folder ~ "/logs/" ~ stage) | replace("%", "%%")) ~ ("-%A_%a.log" if tasks else "-%j.log")) | slurm }}
#SBATCH --open-mode=append
{%- for name, value in [("partition", options.partition or cluster.partition), ("account", cluster.account), ("qos", cluster.qos)] if value is not none %}
#SBATCH --{{ name }}={{ value | slurm }}
{%- endfor %}
{%- if tasks %}
#SBATCH --array=0-{{ tasks - 1 }}{{ "%" ~ options.at_once if options.at_once }}
{%- endif %}
#SBATCH --nodes={{ options.nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ options.cpus }}
{%- if options.memory_gib is not none %}
#SBATCH --mem={{ options.memory_gib }}{{ "G" if options.memory_gib }}
{%- endif %}
{%- if options.gpus %}
#SBATCH --{{ cluster.gpu_request }}={{ ("gpu:" if cluster.gpu_request == "gres") ~ (cluster.gpu_type ~ ":" if cluster.gpu_type) ~ options.gpus }}
{%- endif %}
#SBATCH --time={{ "%02d:%02d:%02d" | format(seconds // 3600, seconds // 60 % 60, seconds % 60) }}
#SBATCH --signal=B:USR1@{{ cluster.warn_s }}
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
{%- for option in cluster.sbatch %}
#SBATCH {{ option }}
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
