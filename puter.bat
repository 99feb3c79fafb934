@echo off
rem BAT OS launcher for Windows: sets up what is missing, then starts, tests, asks or stops.
setlocal EnableExtensions DisableDelayedExpansion
set "HERE=%~dp0"
set "HERE=%HERE:~0,-1%"
if not defined BATOS_HOME set "BATOS_HOME=%HERE%"
if not defined BATOS_VENV set "BATOS_VENV=%HERE%\.venv"
set "RUN=%BATOS_HOME%\run"
set "PY=%BATOS_VENV%\Scripts\python.exe"
set "WATCHDOG=%HERE%\min_watchdog_service.py"
set "CLIENT=%HERE%\chat_client.py"

set "COMMAND=%~1"
if not defined COMMAND set "COMMAND=all"
rem Without outer quotes, so that the quotes of an argument protect what is between them.
set REST=%*
for %%C in (all setup kernel client status stop inspect backup restore verify pack key test help) do if /i "%COMMAND%"=="%%C" goto command_%%C
call :usage 1>&2
exit /b 2

:usage
echo Usage: puter.bat [COMMAND]
echo.
echo   (none)   everything: packages, models, watchdog, kernel, client
echo   setup    packages and models only
echo   kernel   watchdog and kernel in this window
echo   client   the terminal client; options: those of chat_client.py (-c TEXT runs one command)
echo   status   what the kernel says about itself
echo   stop     ends watchdog and kernel of this home
echo   inspect  lists the transactions in the living image (also while the kernel runs); runs nothing of it;
echo            --object NAME for one object
echo   backup   what is new in the image, verified by restoring it; --to FOLDER, --full
echo   restore  puts a backup in the place of the image, which is kept; --at TIME, --from FOLDER, --to FILE
echo   verify   reads the whole image and says whether it is sound; --backups for the newest backup
echo   pack     forgets versions that were replaced long ago; --days N
echo   key      which clients may speak to the kernel: key add NAME, key list, key revoke NAME
echo   test     style, types and all tests; further arguments go to pytest
echo   help     this text
echo.
echo BATOS_HOME (this folder) holds image, keys and logs, BATOS_VENV (.venv) the packages,
echo BATOS_MODELS_DIR (the user's cache folder) the models. docs\OPERATIONS.md has the rest.
exit /b 0

rem ---------------------------------------------------------------------------------- commands

:command_help
call :usage
exit /b 0

:command_all
call :set_up || exit /b 1
"%PY%" "%WATCHDOG%" --pid >nul 2>&1 || start "BAT OS Watchdog Service" cmd /k call "%HERE%\puter.bat" kernel
call :wait_until_live || exit /b 1
start "BAT OS Client" cmd /k call "%HERE%\puter.bat" client
exit /b 0

:command_setup
call :set_up || exit /b 1
echo BAT OS is set up; start it with: puter.bat
exit /b 0

:command_kernel
call :set_up || exit /b 1
if defined REST set REST=%REST:*kernel=%
"%PY%" "%WATCHDOG%" %REST%
exit /b %ERRORLEVEL%

:command_client
call :set_up || exit /b 1
if defined REST set REST=%REST:*client=%
"%PY%" "%CLIENT%" %REST%
exit /b %ERRORLEVEL%

:command_status
call :need_set_up || exit /b 1
"%PY%" "%CLIENT%" -c /status 2>nul && exit /b 0
"%PY%" "%WATCHDOG%" --pid >nul 2>&1
if errorlevel 1 (
    echo Nothing runs in "%BATOS_HOME%". 1>&2
) else (
    echo error: the watchdog runs, but the kernel does not answer; see "%RUN%\kernel.log" 1>&2
)
exit /b 1

rem A process of another console can't be signalled here: the kernel is told to shut down, the watchdog follows it.
:command_stop
call :need_set_up || exit /b 1
"%PY%" "%WATCHDOG%" --pid >nul 2>&1
if errorlevel 1 (
    echo Nothing runs in "%BATOS_HOME%". 1>&2
    exit /b 0
)
"%PY%" "%CLIENT%" -c /shutdown || exit /b 1
:await_stop
"%PY%" "%WATCHDOG%" --pid >nul 2>&1
if not errorlevel 1 (
    call :pause_a_second
    goto await_stop
)
echo Stopped. 1>&2
exit /b 0

:command_inspect
call :need_set_up || exit /b 1
set "IMAGE="
"%PY%" "%HERE%\config.py" DB_FILE >"%RUN%\image.txt" || exit /b 1
set /p IMAGE=<"%RUN%\image.txt"
if not exist "%IMAGE%" (
    echo error: there is no image file "%IMAGE%"; start the kernel once 1>&2
    exit /b 1
)
if defined REST set REST=%REST:*inspect=%
pushd "%HERE%"
"%PY%" -m uvm.image.dump "%IMAGE%" %REST%
set "STATUS=%ERRORLEVEL%"
popd
exit /b %STATUS%

:command_key
call :need_set_up || exit /b 1
if not exist "%RUN%" mkdir "%RUN%"
set "KEYS="
"%PY%" "%HERE%\config.py" KEYS_DIR >"%RUN%\keys.txt" || exit /b 1
set /p KEYS=<"%RUN%\keys.txt"
if defined REST set REST=%REST:*key=%
pushd "%HERE%"
"%PY%" -m uvm.keys --keys-dir "%KEYS%" %REST%
set "STATUS=%ERRORLEVEL%"
popd
exit /b %STATUS%

:command_backup
:command_restore
:command_verify
:command_pack
call :need_set_up || exit /b 1
"%PY%" "%HERE%\upkeep.py" %*
exit /b %ERRORLEVEL%

:command_test
call :set_up || exit /b 1
call :install_packages requirements-dev.txt || exit /b 1
set "FAILED=0"
if defined REST set REST=%REST:*test=%
pushd "%HERE%"
call :check ruff check .
call :check ruff format --check .
call :check mypy
call :check pytest %REST%
popd
if "%FAILED%"=="0" (echo All checks passed.) else (echo Checks failed: %FAILED%.)
if "%FAILED%"=="0" exit /b 0
exit /b 1

:check
echo.
echo == %*
"%PY%" -m %*
if errorlevel 1 (
    set /a FAILED+=1
    echo == FAILED: %*
)
exit /b 0

rem ------------------------------------------------------------------------------------ set-up

:set_up
if not exist "%RUN%" mkdir "%RUN%"
call :install_packages requirements.txt || exit /b 1
pushd "%HERE%"
"%PY%" -m uvm.mind.assets --quiet
if errorlevel 1 (
    popd
    exit /b 1
)
popd
exit /b 0

:need_set_up
if exist "%PY%" exit /b 0
echo error: nothing is set up here yet; run: puter.bat setup 1>&2
exit /b 1

rem install_packages FILE: does nothing if the environment's stamp says that these very files are installed.
:install_packages
set "STAMP=%BATOS_VENV%\%~1.stamp"
set "WANTED=%RUN%\wanted.stamp"
"%PY%" -c "" >nul 2>&1 || call :create_venv || exit /b 1
"%PY%" -c "import hashlib, sys; print(sys.version, hashlib.sha256(b''.join(open(name, 'rb').read() for name in sys.argv[1:])).hexdigest())" "%HERE%\requirements.txt" "%HERE%\%~1" >"%WANTED%" || exit /b 1
fc /b "%WANTED%" "%STAMP%" >nul 2>&1 && exit /b 0
call :check_compiler || exit /b 1
echo Installing %~1 (minutes, the first time; log: "%RUN%\setup.log") ... 1>&2
"%PY%" -m pip install --disable-pip-version-check -r "%HERE%\%~1" >>"%RUN%\setup.log" 2>&1 || goto set_up_failed
copy /y "%WANTED%" "%STAMP%" >nul
exit /b 0

:create_venv
set "PYTHON="
for %%P in ("py -3.13" "py -3.12" "py -3.11" "python") do if not defined PYTHON call :try_python %%~P
if not defined PYTHON (
    echo error: Python 3.11 or newer is missing; install it with: winget install Python.Python.3.13 1>&2
    exit /b 1
)
echo Creating the virtual environment ... 1>&2
%PYTHON% -m venv --clear "%BATOS_VENV%" >>"%RUN%\setup.log" 2>&1 || goto set_up_failed
exit /b 0

:try_python
%* -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>&1 && set "PYTHON=%*"
exit /b 0

:check_compiler
where cl >nul 2>&1 && exit /b 0
where clang++ >nul 2>&1 && exit /b 0
set "VSWHERE=%ProgramFiles(x86)%\Microsoft Visual Studio\Installer\vswhere.exe"
set "TOOLS=Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
if exist "%VSWHERE%" "%VSWHERE%" -products * -requires %TOOLS% -property installationPath | findstr . >nul && exit /b 0
echo error: a C++ compiler is missing (llama-cpp-python is built from source); install it with: 1>&2
echo   winget install Microsoft.VisualStudio.2022.BuildTools --override "--passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended" 1>&2
exit /b 1

:set_up_failed
powershell -NoProfile -Command "Get-Content -Tail 20 -LiteralPath $env:RUN\setup.log" 1>&2
echo error: the set-up failed; the whole log: "%RUN%\setup.log" 1>&2
exit /b 1

rem ------------------------------------------------------------------------ watchdog and kernel

:wait_until_live
echo Waiting for the kernel (log: "%RUN%\kernel.log") ... 1>&2
set "ABSENT=0"
:await_live
"%PY%" "%CLIENT%" -c /status >nul 2>&1 && exit /b 0
"%PY%" "%WATCHDOG%" --pid >nul 2>&1 && set "ABSENT=0" || set /a ABSENT+=1
if %ABSENT% geq 10 (
    echo error: the kernel did not start; its window and "%RUN%\kernel.log" say why 1>&2
    exit /b 1
)
call :pause_a_second
goto await_live

:pause_a_second
ping -n 2 127.0.0.1 >nul
exit /b 0
