# shellcheck shell=bash
# Files of settings (`.env`): read as a shell reads assignments, never executed. And what a secret
# looks like. Sourced by launch.sh on the laptop and by worker_run.sh on the workers.

# is_name WORD: can it be the name of a variable?
is_name() {
  case $1 in
    '' | [0-9]* | *[!A-Za-z0-9_]*) return 1 ;;
  esac
}

# each_setting FILE FUNCTION [strict]: calls FUNCTION with each name and value. Understood: `export`,
# quotes (also over several lines), backslashes, comments, CRLF, a byte order mark. Nothing is
# executed; with `strict` a value that a shell would put together from variables or commands is
# refused, so that nobody gets another value than he meant. Messages never show a value.
each_setting() {
  local line='' rest key value c quote number=0 first more expands continued slash
  slash=$(printf '\134')
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [ "$number" -gt 1 ] || line=${line#$'\xef\xbb\xbf'}
    line=${line#"${line%%[![:space:]]*}"}
    case $line in '' | \#*) continue ;; esac
    case $line in
      export[[:blank:]]*)
        line=${line#export}
        line=${line#"${line%%[![:space:]]*}"}
        ;;
    esac
    key=${line%%=*}
    if [ "$key" = "$line" ] || ! is_name "$key"; then
      die "${EX_USAGE:-2}" "$1: line $number: expected KEY=VALUE (a name, no blanks around the =)."
    fi
    rest=${line#*=} value='' quote='' first=$number expands=0 continued=0
    while :; do
      while [ -n "$rest" ]; do
        c=${rest:0:1}
        rest=${rest:1}
        if [ "$quote" = "'" ]; then
          if [ "$c" = "'" ]; then quote=''; else value+=$c; fi
          continue
        fi
        case $c in
          "$slash")
            c=${rest:0:1}
            rest=${rest:1}
            case $quote$c in
              '' | '"') continued=1 ;; # at the end of a line: the value goes on in the next one
              '""' | '"$' | '"`' | "\"$slash") value+=$c ;;
              '"'*) value+=$slash$c ;;
              *) value+=$c ;;
            esac
            ;;
          '$')
            case $rest in [A-Za-z_]* | '{'* | '('*) expands=1 ;; esac
            value+=$c
            ;;
          '`') expands=1 value+=$c ;;
          '"') if [ -n "$quote" ]; then quote=''; else quote=$c; fi ;;
          "'") if [ -n "$quote" ]; then value+=$c; else quote=$c; fi ;;
          ' ' | $'\t')
            # A comment needs a blank before it; blanks at the end do not count.
            more=${rest#"${rest%%[![:space:]]*}"}
            if [ -z "$quote" ]; then
              case $more in '' | \#*) break ;; esac
            fi
            value+=$c
            ;;
          *) value+=$c ;;
        esac
      done
      [ -n "$quote" ] || [ "$continued" = 1 ] || break
      IFS= read -r rest || [ -n "$rest" ] || [ -z "$quote" ] ||
        die "${EX_USAGE:-2}" "$1: line $first: $key: the quote $quote is never closed."
      number=$((number + 1))
      rest=${rest%$'\r'}
      [ "$continued" = 1 ] || value+=$'\n'
      [ -n "$rest" ] || [ -n "$quote" ] || break
      continued=0
    done
    if [ "$expands" = 1 ] && [ "${3:-}" = strict ]; then
      die "${EX_USAGE:-2}" "$1: line $first: $key: a shell would fill in a variable or a command" \
        "here and this reader does not; put the value into single quotes to keep it as it is."
    fi
    "$2" "$key" "$value"
  done <"$1"
}

# secret_name NAME: does a variable of this name hold a secret? Its last word says so: HF_TOKEN does,
# TOKENIZERS_PARALLELISM, MAX_TOKENS and HF_TOKEN_PATH do not.
secret_name() {
  case _$(printf '%s' "$1" | tr '[:lower:]' '[:upper:]') in
    _GOOGLE_APPLICATION_CREDENTIALS | _PWD) return 1 ;; # paths
    # Of a tokenizer, of a count, of a table.
    *_PAD_TOKEN | *_EOS_TOKEN | *_BOS_TOKEN | *_UNK_TOKEN | *_SEP_TOKEN | *_CLS_TOKEN | *_MASK_TOKEN | \
      *_IMAGE_TOKEN | *_STOP_TOKEN | *_END_TOKEN | *_START_TOKEN | *_SPECIAL_TOKEN | *_PER_TOKEN | *_MAX_TOKEN | \
      *_NEW_TOKEN | *_SORT_KEY | *_CACHE_KEY | *_PRIMARY_KEY | *_PARTITION_KEY | *_GROUP_KEY | *_INDEX_KEY | \
      *_PUBLIC_KEY) return 1 ;;
    *TOKEN | *_KEY | *APIKEY | *API_KEYS | *ACCESS_TOKENS | *AUTH_TOKENS | *SECRET | *SECRETS | \
      *PASSWORD | *PASSWORDS | *PASSWD | *PASSPHRASE | *_PASS | *_PWD | *CREDENTIAL | *CREDENTIALS) ;;
    *) return 1 ;;
  esac
}

# secret_value TEXT: does the text itself look like a secret, whatever it is called?
secret_value() {
  local pattern='(^|[^A-Za-z0-9])(hf_[A-Za-z0-9]{30}|gh[opsu]_[A-Za-z0-9]{30}|github_pat_[A-Za-z0-9_]{30}'
  pattern+='|glpat-[A-Za-z0-9_-]{20}|sk-[A-Za-z0-9_-]{30}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30}|ya29[.][A-Za-z0-9_-]{20}'
  pattern+='|xox[abp]-[A-Za-z0-9-]{20})|PRIVATE KEY-----|://[^/@ :]+:[^/@ ]+@'
  [[ $1 =~ $pattern ]]
}
