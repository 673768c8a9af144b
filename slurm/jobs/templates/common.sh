# shellcheck shell=bash disable=SC2154 # jobs, artifact, grows, max_restarts: set by the job
# What the jobs of `fledge submit` do around their stage: one of a kind at a time, signals passed on, another start
# where the stage asks for one, and a line in events/ for everything that `fledge status` tells.

again=75 # exit code of a stage that a signal has stopped, with everything saved
# The id of this job alone: that of an array's last task is, by itself, the whole array's.
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
me=${me:-$SLURM_JOB_ID}
stopping=""
pid=""

tell() { # EVENT [DETAIL]
  printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$me" "$1" "${2-}" >>"$jobs/events/$job"
}

fail() { # WHY [CODE]
  echo "fledge: error: $job: $1" >&2
  tell failed "$1"
  out_of_service
  exit "${2:-1}"
}

# Tell those who wait for this server, if it is one, that it will not come.
out_of_service() {
  [[ $job != server-* ]] || touch "$jobs/servers/${job#server-}.failed"
}

# Print what grows while the stage gets on.
progress() {
  find "$artifact" -name "$grows" -printf '%p %s\n' 2>/dev/null | sort | cksum || true
}

# Return whether Slurm runs a job; if it does not answer, take it for running.
is_running() { # JOB
  local answer
  if answer=$(squeue --noheader --jobs="$1" --states=RUNNING,COMPLETING,SUSPENDED --format=%T 2>&1); then
    grep --quiet --line-regexp --extended-regexp 'RUNNING|COMPLETING|SUSPENDED' <<<"$answer"
  else
    [[ $answer != *"Invalid job id"* ]]
  fi
}

# Take the lock of this job's name, across submissions: a link to its owner's id, which every file system makes for one
# alone. A killed job leaves it; the next finds that its owner does not run.
claim() {
  local lock=$jobs/../locks/$job owner
  while ! ln -s "$me" "$lock" 2>/dev/null; do
    owner=$(readlink "$lock") || fail "$lock cannot be made"
    [[ $owner != "$me" ]] || return 0
    ! is_running "$owner" || fail "job $owner is at work on it: wait for its end, or cancel it"
    [[ $(readlink "$lock") != "$owner" ]] || rm -f "$lock"
  done
  sleep 1
  [[ $(readlink "$lock") == "$me" ]] || fail "another job has begun it at the same time"
}

begin() { # NAME
  job=$1
  mkdir -p "$jobs"/{events,restarts,servers} "$jobs/../locks"
  claim
  tell begun "$(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1))"
  [[ -e $jobs/restarts/$job ]] || echo "0 $(progress)" >"$jobs/restarts/$job"
  trap 'stop SIGUSR1' USR1
  trap 'stop SIGTERM' TERM
}

# SIGUSR1 comes before the time limit, SIGTERM before a pre-emption. srun passes SIGUSR1 on to every task.
stop() { # SIGNAL
  stopping=$1 interrupted=yes
  tell stopping "$1"
  [[ -z $pid ]] || kill -s USR1 "$pid" 2>/dev/null || true
}

# Wait for the process `pid`, through signals; set `code`.
await() {
  local waited
  code=0
  while :; do
    interrupted=""
    waited=0
    wait "$pid" || waited=$?
    ((waited == 127)) || code=$waited # 127: a signal came when it had ended, and its code was told
    [[ -n $interrupted ]] || break
  done
  pid=""
}

# Run the stage, and end the job: done, failed, or started again by Slurm.
run() { # COMMAND...
  [[ -z $stopping ]] || restart "stopped by $stopping"
  "$@" &
  pid=$!
  await
  case $code in
  0)
    tell "done"
    exit 0
    ;;
  "$again" | 138 | 143) restart "stopped by ${stopping:-a signal, or asks for another start}" ;; # 128 + SIGUSR1, SIGTERM
  *)
    [[ -z $stopping ]] || restart "stopped by $stopping, exit code $code"
    fail "exit code $code" "$code"
    ;;
  esac
}

# Return whether Slurm ends this job, and not for its time limit: somebody has cancelled it.
is_cancelled() {
  grep --quiet --line-regexp --extended-regexp '(COMPLETING|CANCELLED) None' \
    <<<"$(squeue --noheader --jobs="$me" --states=all --format='%T %r')"
}

restart() { # WHY
  local count before now
  trap '' USR1 TERM # Slurm ends this start by SIGTERM, to begin the next: no news, and nothing for scontrol to die of
  if is_cancelled; then
    tell cancelled "$1"
    out_of_service
    exit "$again"
  fi
  read -r count before <"$jobs/restarts/$job"
  now=$(progress)
  if [[ $now == "$before" ]]; then count=$((count + 1)); else count=0; fi
  echo "$count $now" >"$jobs/restarts/$job"
  ((count < max_restarts)) || fail "$count starts in a row brought no progress; the last: $1"
  tell again "$1"
  requeue
  exit "$again"
}

# Have Slurm start this job again. It may be too busy to listen, or has done so by itself, where it pre-empts.
requeue() {
  local said
  for _ in {1..10}; do
    ! said=$(scontrol requeue "$me" 2>&1) || return 0
    echo "fledge: $said" >&2
    sleep 6
  done
  fail "Slurm does not start it again: $said"
}

# Print a port that nobody listens on, another in each start.
free_port() {
  local port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# Return whether a server is well.
answers() { # URL
  curl --silent --fail --noproxy '*' --max-time 5 --output /dev/null "${1%/v1}/health"
}

# Run a server until the array that asks it has ended. servers/N.starting, then N.healthy, holds its address.
serve() { # URL SECONDS COMMAND...
  local url=$1 deadline=$((SECONDS + $2)) file=$jobs/servers/${job#server-}
  rm -f "$file".*
  echo "$url" >"$file.starting"
  trap 'rm -f "$file.starting" "$file.healthy"' EXIT
  "${@:3}" &
  local server=$! answered="" ended="" look=0 code=0
  while [[ -z $stopping ]]; do
    if ((SECONDS >= look)); then
      if array_has_ended; then
        ended=yes
        break
      fi
      look=$((SECONDS + 15)) # Slurm is not to be asked all the time
    fi
    if ! kill -0 "$server" 2>/dev/null; then
      wait "$server" || code=$?
      # 0, 138, 143: a pre-emption may tell the server alone, by SIGTERM
      [[ -n $answered || $code == @(0|138|143) ]] || fail "the server ended with exit code $code before it answered"
      restart "the server ended with exit code $code"
    fi
    if [[ ! -e $file.healthy ]]; then
      ((SECONDS < deadline)) || fail "no answer from ${url%/v1}/health in $2 s (cluster.server.ready_s)"
      if answers "$url"; then
        answered=yes
        mv "$file.starting" "$file.healthy"
        tell healthy "$url"
      fi
    fi
    sleep 2
  done
  rm -f "$file.starting" "$file.healthy"
  kill -s TERM "$server" 2>/dev/null || true
  for _ in {1..30}; do
    kill -0 "$server" 2>/dev/null || break
    sleep 1
  done
  kill -s KILL "$server" 2>/dev/null || true # what is left of its step ends with the job
  [[ -n $ended ]] || array_has_ended || restart "stopped by $stopping"
  tell "done"
  exit 0
}

# Return whether Slurm knows the array no more. Not while it does not answer, gives a list without this very job, or the
# array is not known yet.
array_has_ended() {
  local array known
  array=$(cat "$jobs/synthesize.job" 2>/dev/null) && [[ -n $array ]] || return 1
  known=$(squeue --noheader --user="$(id -un)" --format=%F) || return 1
  grep --quiet --line-regexp "$SLURM_ARRAY_JOB_ID" <<<"$known" || return 1
  ! grep --quiet --line-regexp "$array" <<<"$known"
}

# Return whether a server that was healthy still is: if a node was lost, it has left its address.
any_answers() {
  local file
  for file in "$jobs"/servers/*.healthy; do
    [[ ! -e $file ]] || ! answers "$(<"$file")" || return 0
  done
  return 1
}

# Wait until a server is healthy, which may first have to wait for a node.
wait_for_servers() { # NUMBER
  until any_answers; do
    [[ -z $stopping ]] || restart "stopped by $stopping"
    (($(find "$jobs/servers" -name '*.failed' | wc -l) < $1)) || fail "every server has failed, or was cancelled"
    sleep 2
  done
}
